/**
 * The ports of the services: chosen free at the first start and kept in `ports.json`, so that who reads a branch's WAL (a hot standby, pg_receivewal) finds
 * the safekeepers again after a restart of the platform. A port that somebody else has taken meanwhile is replaced.
 */
import { readFileSync } from 'node:fs';
import { createServer, type Server } from 'node:net';
import { join } from 'node:path';
import { writeFileDurably } from '../base/durable-file.ts';
import { listenOnFreePort } from '../base/free-port.ts';
import { listen } from '../base/rpc.ts';

const FILE_NAME = 'ports.json';

export interface ServicePorts {
  readonly rpcPort: number;
  readonly pagePort: number;
  readonly safekeeperPorts: readonly number[];
}

/** All different, free when this resolves, and none that is chosen is one of `reserved`, which others are about to take. Safekeepers' are in the order of their ids, which begin with 1. */
export async function servicePorts(
  dataDir: string,
  host: string,
  safekeeperCount: number,
  reserved: readonly number[] = [],
): Promise<ServicePorts> {
  const path = join(dataDir, FILE_NAME);
  const kept = readKept(path);
  const servers: Server[] = [];
  const ports: number[] = [];
  try {
    for (let index = 0; index < 2 + safekeeperCount; index++) {
      const server = createServer();
      servers.push(server);
      ports.push(await listenAgain(server, host, kept[index], reserved));
    }
  } finally {
    await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  }
  if (ports.some((port, index) => port !== kept[index])) writePorts(path, ports);
  const [rpcPort, pagePort, ...safekeeperPorts] = ports;
  return { rpcPort: rpcPort!, pagePort: pagePort!, safekeeperPorts };
}

/** Of a safekeeper that is added while the platform runs: later starts find it there too. */
export function keepSafekeeperPort(dataDir: string, nodeId: number, port: number): void {
  const path = join(dataDir, FILE_NAME);
  const ports = [...readKept(path)];
  ports[1 + nodeId] = port;
  writePorts(path, ports);
}

function writePorts(path: string, ports: readonly (number | undefined)[]): void {
  writeFileDurably(path, `${JSON.stringify({ version: 1, ports: Array.from(ports) })}\n`, 0o600);
}

async function listenAgain(
  server: Server,
  host: string,
  port: number | undefined,
  reserved: readonly number[],
): Promise<number> {
  if (port === undefined) return listenOnFreePort(server, host, reserved);
  try {
    await listen(server, host, port);
    return port;
  } catch {
    return listenOnFreePort(server, host, reserved);
  }
}

/** Of the pageserver's calls, its pages, and of each safekeeper. */
function readKept(path: string): readonly (number | undefined)[] {
  try {
    const { ports } = JSON.parse(readFileSync(path, 'utf8')) as { ports?: unknown };
    if (!Array.isArray(ports)) return [];
    return ports.map((port: unknown) =>
      Number.isInteger(port) && (port as number) > 0 ? (port as number) : undefined,
    );
  } catch {
    return []; // None yet, or not readable: new ones are as good.
  }
}
