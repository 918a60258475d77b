/** Virtual time: events run in order of their time, then in the order in which they were made. */
interface Event {
  readonly at: number;
  readonly order: number;
  readonly run: () => void;
}

export class Scheduler {
  /** A binary heap. */
  readonly #events: Event[] = [];
  #now = 0;
  #made = 0;

  get now(): number {
    return this.#now;
  }

  after(delayMs: number, run: () => void): void {
    const events = this.#events;
    events.push({ at: this.#now + delayMs, order: this.#made++, run });
    for (let child = events.length - 1; child > 0;) {
      const parent = (child - 1) >> 1;
      if (!isBefore(events[child]!, events[parent]!)) break;
      [events[child], events[parent]] = [events[parent]!, events[child]!];
      child = parent;
    }
  }

  runUntil(timeMs: number): void {
    for (let event = this.#events[0]; event !== undefined && event.at <= timeMs; event = this.#events[0]) {
      this.#removeFirst();
      this.#now = event.at;
      event.run();
    }
    this.#now = timeMs;
  }

  #removeFirst(): void {
    const events = this.#events;
    const last = events.pop()!;
    if (events.length === 0) return;
    events[0] = last;
    for (let parent = 0; ;) {
      let least = parent;
      for (const child of [2 * parent + 1, 2 * parent + 2]) {
        if (child < events.length && isBefore(events[child]!, events[least]!)) least = child;
      }
      if (least === parent) return;
      [events[parent], events[least]] = [events[least]!, events[parent]!];
      parent = least;
    }
  }
}

function isBefore(a: Event, b: Event): boolean {
  return a.at < b.at || (a.at === b.at && a.order < b.order);
}
