/** Runs so many pieces of work at a time; the others wait, in order. */
export class TurnQueue {
  readonly #countMax: number;
  readonly #waiting: (() => void)[] = [];
  #count = 0;

  constructor(countMax: number) {
    this.#countMax = countMax;
  }

  async inTurn<T>(work: () => Promise<T>): Promise<T> {
    if (this.#count >= this.#countMax) await new Promise<void>((resolve) => this.#waiting.push(resolve));
    else this.#count++;
    try {
      return await work();
    } finally {
      const next = this.#waiting.shift();
      if (next === undefined) this.#count--;
      else next();
    }
  }
}
