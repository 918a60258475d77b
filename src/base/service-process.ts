/**
 * The contract between the supervisor and a service that runs as a child process (pageserver, safekeeper):
 *   - the configuration is one line of JSON on standard input (not in the arguments, as it holds secrets);
 *   - when the service is ready it writes one line of JSON to standard output;
 *   - standard input stays open for the service's life: its end means that the supervisor is gone, and the service stops;
 *   - SIGTERM asks for a clean stop.
 */
import { createInterface } from 'node:readline';

export interface ServiceHandle {
  close(): Promise<void>;
}

/** Runs the service until asked to stop or the supervisor is gone. `ready` is what the service tells the supervisor. */
export async function runServiceProcess<Config>(
  start: (config: Config) => Promise<{ service: ServiceHandle; ready: Readonly<Record<string, unknown>> }>,
): Promise<void> {
  const lines = createInterface({ input: process.stdin });
  const parentGone = new Promise<void>((resolve) => lines.once('close', resolve));
  const config = await new Promise<Config>((resolve, reject) => {
    lines.once('line', (line) => {
      try {
        resolve(JSON.parse(line) as Config);
      } catch (error) {
        reject(error as Error);
      }
    });
    lines.once('close', () => reject(new Error('standard input ended before the configuration came')));
  });
  const asked = new Promise<void>((resolve) => {
    process.once('SIGTERM', resolve);
    process.on('SIGINT', () => {}); // Ctrl-C reaches the whole process group; the supervisor decides.
  });
  const { service, ready } = await start(config);
  process.stdout.write(`${JSON.stringify(ready)}\n`);
  await Promise.race([asked, parentGone]);
  await service.close();
  process.exit(0);
}
