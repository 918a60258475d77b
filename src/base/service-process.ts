/**
 * The contract between the supervisor and a service that runs as a child process (pageserver, safekeeper):
 *   - the configuration is one line of JSON on standard input (not in the arguments, as it holds secrets);
 *   - when the service is ready it writes one line of JSON to standard output;
 *   - standard input stays open for the service's life: its end asks for a clean stop, and comes too when the supervisor is gone;
 *   - each line PING that follows is answered by a line ALIVE, which shows that the service is not stuck;
 *   - SIGTERM is only passed on, as a line ASKED: one that reaches the whole process group must not stop the services before the Postgres that
 *     need them, and the supervisor knows which of the two it is. SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) reach the group too and are the
 *     supervisor's alone.
 */
import { createInterface } from 'node:readline';

export const PING = 'ping';
export const ALIVE = 'alive';
export const ASKED = 'asked';

export interface ServiceHandle {
  close(): Promise<void>;
}

/** Runs the service until asked to stop or the supervisor is gone. `ready` is what the service tells the supervisor. */
export async function runServiceProcess<Config>(
  start: (config: Config) => Promise<{ service: ServiceHandle; ready: Readonly<Record<string, unknown>> }>,
): Promise<void> {
  const say = (line: string): void => void process.stdout.write(`${line}\n`);
  process.stdout.on('error', () => {}); // The supervisor is gone, which the end of the input says too.
  let isReady = false;
  let isAsked = false;
  process.on('SIGTERM', () => {
    isAsked = true;
    if (isReady) say(ASKED);
  });
  process.on('SIGINT', () => {});
  process.on('SIGHUP', () => {});
  const lines = createInterface({ input: process.stdin });
  const ended = new Promise<void>((resolve) => lines.once('close', resolve));
  const config = await new Promise<Config>((resolve) => {
    lines.once('line', (line) => {
      try {
        resolve(JSON.parse(line) as Config);
      } catch {
        refuse();
      }
    });
    lines.once('close', refuse);
    if (process.stdin.isTTY) refuse();
  });
  lines.off('close', refuse);
  lines.on('line', (line) => {
    if (line === PING) say(ALIVE);
  });
  const { service, ready } = await start(config);
  say(JSON.stringify(ready));
  isReady = true;
  if (isAsked) say(ASKED);
  await ended;
  await service.close();
  process.exit(0);
}

/** Whoever started this is no supervisor, but a person as a rule. */
function refuse(): never {
  const [name = 'this'] = process.argv.slice(2);
  process.stderr.write(
    `strata: ${name} is a part of the platform: "strata start" starts all of them, "strata --help" shows the commands\n`,
  );
  process.exit(2);
}
