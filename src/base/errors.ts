/**
 * The errors that callers act on: one table from code to HTTP status, SQLSTATE and whether trying again can help.
 * A code exists only if some caller would treat it differently from the others.
 * SQLSTATEs: https://www.postgresql.org/docs/17/errcodes-appendix.html
 */
export const errorTable = {
  'bad-request': { httpStatus: 400, sqlState: '22023', retry: false },
  unauthorized: { httpStatus: 401, sqlState: '28000', retry: false },
  forbidden: { httpStatus: 403, sqlState: '42501', retry: false },
  'not-found': { httpStatus: 404, sqlState: '3D000', retry: false },
  conflict: { httpStatus: 409, sqlState: '42710', retry: false },
  'history-gone': { httpStatus: 410, sqlState: '22023', retry: false },
  locked: { httpStatus: 423, sqlState: '55006', retry: true },
  'not-implemented': { httpStatus: 501, sqlState: '0A000', retry: false },
  internal: { httpStatus: 500, sqlState: 'XX000', retry: false },
  unavailable: { httpStatus: 503, sqlState: '57P03', retry: true },
  timeout: { httpStatus: 504, sqlState: '57P03', retry: true },
} as const;

export type ErrorCode = keyof typeof errorTable;

/** An error of the world (not a bug of ours) with a code of `errorTable`. The message carries the values, never a secret. */
export class StrataError extends Error {
  readonly code: ErrorCode;

  constructor(code: ErrorCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.name = 'StrataError';
    this.code = code;
  }
}

/** Any thrown value as a StrataError: unknown ones become `internal`. */
export function toStrataError(error: unknown): StrataError {
  if (error instanceof StrataError) return error;
  return new StrataError('internal', error instanceof Error ? error.message : String(error), { cause: error });
}
