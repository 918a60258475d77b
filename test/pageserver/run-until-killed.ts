/** For tests: runs a writer (crash-writer.ts, remote-crash-writer.ts) until it dies. */

import { spawn } from 'node:child_process';

export interface Death {
  /** What it has said before, whole lines. */
  readonly lines: readonly string[];
  /** False when it had to be killed from outside, after `killAfterMs`. */
  readonly wasItself: boolean;
}

/** Rejects when the writer ends in another way than by SIGKILL. */
export async function runUntilKilled(
  writer: string,
  args: readonly (string | number)[],
  killAfterMs: number,
  environment: Readonly<Record<string, string>> = {},
): Promise<Death> {
  const child = spawn(process.execPath, [writer, ...args.map(String)], {
    stdio: ['ignore', 'pipe', 'inherit'],
    env: { ...process.env, ...environment },
  });
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
  let wasItself = true;
  const timer = setTimeout(() => {
    wasItself = false;
    child.kill('SIGKILL');
  }, killAfterMs);
  await new Promise<void>((resolve, reject) => {
    child.once('close', (code, signal) => {
      if (signal === 'SIGKILL') resolve();
      else reject(new Error(`the writer ended by itself: ${code ?? signal}`));
    });
  }).finally(() => clearTimeout(timer));
  return { lines: output.split('\n').slice(0, -1), wasItself };
}
