/**
 * Work in lanes: within a lane one piece at a time, in the order of asking; lanes do not wait for each other.
 */
export class Lanes {
  readonly #tails = new Map<string, Promise<unknown>>();

  /** Runs `work` when everything asked before in this lane is over, however it ended. */
  run<T>(lane: string, work: () => Promise<T>): Promise<T> {
    const before = this.#tails.get(lane) ?? Promise.resolve();
    const result = before.then(work, work);
    const tail = result
      .then(
        () => undefined,
        () => undefined,
      )
      .then(() => {
        if (this.#tails.get(lane) === tail) this.#tails.delete(lane);
      });
    this.#tails.set(lane, tail);
    return result;
  }

  isBusy(lane: string): boolean {
    return this.#tails.has(lane);
  }
}
