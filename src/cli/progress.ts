/** Progress of long work, for people: a line on standard error every few seconds. */
import type { CliContext } from './context.ts';
import { formatBytes } from './format.ts';

const PROGRESS_INTERVAL_MS = 2_000;

export interface ByteProgress {
  readonly doneBytes: number;
  readonly totalBytes: number;
}

/** Calls `print` with what `describe` makes of it, unless it was called a moment ago. */
export function occasionally<T>(
  context: CliContext,
  describe: (progress: T, elapsedMs: number) => string,
): (progress: T) => void {
  const startedMs = context.now();
  let printedMs = startedMs;
  return (progress) => {
    const nowMs = context.now();
    if (nowMs - printedMs < PROGRESS_INTERVAL_MS) return;
    printedMs = nowMs;
    context.printError(describe(progress, nowMs - startedMs));
  };
}

/** `45 %, 1.20 GB of 2.70 GB, 310 MB/s`. */
export function byteProgressPrinter(context: CliContext): (progress: ByteProgress) => void {
  return occasionally<ByteProgress>(context, ({ doneBytes, totalBytes }, elapsedMs) => {
    const percent = Math.floor((100 * doneBytes) / Math.max(totalBytes, 1));
    const speed = formatBytes((doneBytes / Math.max(elapsedMs, 1)) * 1000);
    return `${percent} %, ${formatBytes(doneBytes)} of ${formatBytes(totalBytes)}, ${speed}/s`;
  });
}
