/**
 * Logging: JSON lines by pino, to standard error or to a file (the platform keeps one file per process in the data directory).
 * Values of keys that hold secrets are replaced before they are written.
 */
import { destination, type Logger, pino } from 'pino';

export type { Logger };

export interface LogOptions {
  readonly name: string;
  /** Absent: standard error. */
  readonly file?: string;
  readonly level?: string;
}

export function createLog(options: LogOptions): Logger {
  const level = options.level ?? process.env['STRATA_LOG_LEVEL'] ?? 'info';
  const redact = ['password', 'token', 'secret', '*.password', '*.token', '*.secret', 'req.headers.authorization'];
  const target = options.file === undefined ? destination(2) : destination({ dest: options.file, mkdir: true });
  return pino({ name: options.name, level, redact }, target);
}
