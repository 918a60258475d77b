/**
 * Work that comes at any time, and is done by one run at a time: a run goes on as long as it finds some, and the next begins when more has come after the
 * last look of the one before.
 */
export class SingleRun {
  readonly #run: () => Promise<void>;
  readonly #isWanted: () => boolean;
  #current: Promise<void> | undefined;

  /** `run` never rejects. `isWanted`: whether there is work that another run should take up at once. */
  constructor(run: () => Promise<void>, isWanted: () => boolean) {
    this.#run = run;
    this.#isWanted = isWanted;
  }

  /** Resolves when the run that is under way has ended; undefined when none is. */
  get current(): Promise<void> | undefined {
    return this.#current;
  }

  /** To be called when there is work; it will be looked at. */
  start(): void {
    this.#current ??= this.#run().finally(() => {
      this.#current = undefined;
      if (this.#isWanted()) this.start();
    });
  }

  /** Resolves when no run is under way or wanted. */
  async settled(): Promise<void> {
    while (this.#current !== undefined) await this.#current;
  }
}
