/**
 * Cursors of lists. A cursor is the sort key of a page's last item, as JSON in base64url, so that it stays good when that item goes.
 */
import { StrataError } from '../base/errors.ts';

export interface PageRequest {
  readonly limit: number;
  readonly cursor?: string;
}

export interface Page<Item> {
  readonly items: Item[];
  /** Where the next page begins; absent where there is none to speak of. */
  readonly cursor?: string;
}

export type CursorKey = readonly (string | number)[];

export function encodeCursor(key: CursorKey): string {
  return Buffer.from(JSON.stringify(key)).toString('base64url');
}

export function decodeCursor(cursor: string): CursorKey {
  try {
    const key: unknown = JSON.parse(Buffer.from(cursor, 'base64url').toString());
    if (Array.isArray(key) && key.every((part) => typeof part === 'string' || typeof part === 'number')) return key;
  } catch {
    // Not JSON: answered below.
  }
  throw new StrataError('bad-request', `cursor is not one of ours: ${JSON.stringify(cursor)}`);
}
