/**
 * Which safekeepers get small appends at once: as many as make a quorum. A commit needs no more, and an append costs each safekeeper a message, a write
 * and an answer whatever its size; so the others get the same WAL a few times a second only, in larger appends (proposer.ts).
 *
 * A commit that an eager one holds up waits until the next pause of a few milliseconds ends, when the others get what it needs. One that has been silent for
 * several pauses gives its place to one that waits, so a safekeeper that hangs holds up a few commits only.
 *
 * This chooses only when WAL is sent. What is committed is decided by consensus/proposer.ts from what was acknowledged, by whomever.
 */

/** A flush that takes long now and then is no reason to change. */
const LATE_PAUSES_MAX = 4;

export class EagerPeers {
  /** Peers in the order of preference. */
  #order: readonly number[];
  readonly #quorum: number;
  /** By peer, at how many pauses in a row it owed an answer. */
  readonly #latePauses: number[];

  /** `first` is any number; it decides who is preferred to begin with, so that the timelines of a machine spread their load. */
  constructor(peerCount: number, first: number) {
    this.#order = Array.from({ length: peerCount }, (_, index) => (first + index) % peerCount);
    this.#quorum = Math.floor(peerCount / 2) + 1;
    this.#latePauses = this.#order.map(() => 0);
  }

  has(index: number): boolean {
    return this.#order.indexOf(index) < this.#quorum;
  }

  /** To be called when a pause ends; `isPrompt` tells whether a peer has answered all that it was sent before the pause. */
  choose(isPrompt: (index: number) => boolean): void {
    const late = this.#order.filter((index) => {
      this.#latePauses[index] = isPrompt(index) ? 0 : this.#latePauses[index]! + 1;
      return this.#latePauses[index]! >= LATE_PAUSES_MAX;
    });
    // Who is eager stays so as long as it answers.
    if (late.length > 0) this.#order = [...this.#order.filter((index) => !late.includes(index)), ...late];
  }
}
