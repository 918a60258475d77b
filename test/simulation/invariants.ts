/**
 * What must hold at each step, whatever fails:
 *   - a committed position never changes its bytes: all who say that something is committed mean the same log;
 *   - a new leader's log holds everything committed before it;
 *   - one leader for a term, and one vote of an acceptor in it;
 *   - what an acceptor acknowledged is still there after a crash, unless a leader had it cut.
 */
import { findEnd, LOG_START } from './log-records.ts';
import { LOG_CAPACITY } from './simulated-disk.ts';

export class Violation extends Error {
  override readonly name = 'Violation';
}

export class Invariants {
  /** The bytes of everything that was ever committed. */
  readonly #committed = Buffer.alloc(LOG_CAPACITY);
  #committedEnd = LOG_START;
  #lastStart = 0;
  /** By term, how far its leader committed. */
  readonly #committedIn = new Map<number, number>();
  readonly #leaders = new Map<number, string>();
  readonly #votes = new Map<string, string>();
  readonly #acknowledgedLsn = new Map<number, number>();
  readonly #checkedLsn = new Map<number, number>();
  readonly #wipeCount = new Map<number, number>();

  get committedEnd(): number {
    return this.#committedEnd;
  }

  check(condition: boolean, what: string): void {
    if (!condition) throw new Violation(`broken: ${what}`);
  }

  leads(proposer: string, term: number): void {
    const other = this.#leaders.get(term);
    this.check(other === undefined || other === proposer, `term ${term} has one leader, not ${other} and ${proposer}`);
    this.#leaders.set(term, proposer);
  }

  voted(acceptor: number, term: number, connection: string): void {
    const key = `${acceptor}/${this.#wipeCount.get(acceptor) ?? 0}/${term}`;
    const proposer = connection.split('#')[0]!;
    const other = this.#votes.get(key);
    this.check(
      other === undefined,
      `acceptor ${acceptor} votes once in term ${term}, not for ${other} and ${proposer}`,
    );
    this.#votes.set(key, proposer);
  }

  /** A leader's log, from LOG_START, is committed up to `lsn`. */
  committed(proposer: string, term: number, log: Buffer, lsn: number, isStart: boolean): void {
    // A late leader of a lower term than others may still get its start committed; it will never commit more.
    for (const [other, endLsn] of isStart ? this.#committedIn : []) {
      this.check(other >= term || lsn >= endLsn, `${proposer} starts at ${lsn}, ${endLsn} was committed before`);
    }
    this.#committedIn.set(term, lsn);
    const known = Math.min(lsn, this.#committedEnd) - LOG_START;
    const isSame = log.compare(this.#committed, 0, known, 0, known) === 0;
    this.check(isSame, `what ${proposer} commits up to ${lsn} is what was committed before`);
    if (lsn <= this.#committedEnd) return;
    log.copy(this.#committed, this.#committedEnd - LOG_START, this.#committedEnd - LOG_START, lsn - LOG_START);
    const { endLsn, lastStart } = findEnd(this.#committed, this.#committedEnd, lsn, this.#lastStart);
    this.check(endLsn === lsn, `${lsn} is the end of a whole record; records end at ${endLsn}`);
    this.#committedEnd = lsn;
    this.#lastStart = lastStart;
  }

  /** An acceptor, whose disk has the log from `startLsn` on, says that it is committed up to `lsn`. */
  committedOn(acceptor: number, log: Buffer, startLsn: number, lsn: number): void {
    this.check(lsn <= this.#committedEnd, `acceptor ${acceptor} knows of a commit at ${lsn} that no leader made`);
    const from = Math.min(Math.max(this.#checkedLsn.get(acceptor) ?? LOG_START, startLsn), lsn) - LOG_START;
    const to = lsn - LOG_START;
    const isSame = log.compare(this.#committed, from, to, from, to) === 0;
    this.check(isSame, `what acceptor ${acceptor} has between ${from + LOG_START} and ${lsn} is what was committed`);
    this.#checkedLsn.set(acceptor, lsn);
  }

  acknowledged(acceptor: number, lsn: number): void {
    this.#acknowledgedLsn.set(acceptor, lsn);
  }

  truncated(acceptor: number, lsn: number): void {
    const acknowledged = this.#acknowledgedLsn.get(acceptor) ?? LOG_START;
    this.#acknowledgedLsn.set(acceptor, Math.min(acknowledged, lsn));
    this.#checkedLsn.set(acceptor, LOG_START);
  }

  wiped(acceptor: number): void {
    this.#wipeCount.set(acceptor, (this.#wipeCount.get(acceptor) ?? 0) + 1);
    this.#acknowledgedLsn.delete(acceptor);
    this.#checkedLsn.delete(acceptor);
  }

  restarted(acceptor: number, endLsn: number): void {
    const acknowledged = this.#acknowledgedLsn.get(acceptor) ?? LOG_START;
    this.check(
      endLsn >= acknowledged,
      `acceptor ${acceptor} acknowledged ${acknowledged}, its log ends at ${endLsn} after a restart`,
    );
    this.#checkedLsn.set(acceptor, LOG_START);
  }
}
