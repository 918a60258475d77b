/** WAL that is damaged or is not what it should be. The message names the position as X/Y; `lsn` is it as a number. */

import { formatLsn } from '../lsn.ts';
import type { Lsn } from '../lsn.ts';

export class WalError extends Error {
  override readonly name = 'WalError';
  readonly lsn: Lsn;

  constructor(lsn: Lsn, what: string) {
    super(`WAL at ${formatLsn(lsn)}: ${what}`);
    this.lsn = lsn;
  }
}
