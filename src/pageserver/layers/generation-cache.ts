/**
 * A cache with a bound in bytes, near to least-recently-used and cheap on every hit: two generations. New entries and those that are
 * used again go to the young one; when it holds half of the bound it becomes the old one, and what was in the old one is dropped.
 */

interface Entry<V> {
  readonly value: V;
  readonly sizeBytes: number;
}

export class GenerationCache<V> {
  readonly #halfBytes: number;
  readonly #onDrop: ((value: V) => void) | undefined;
  #young = new Map<number, Entry<V>>();
  #old = new Map<number, Entry<V>>();
  #youngBytes = 0;
  #oldBytes = 0;

  /** `onDrop` is told of each value that leaves the cache. */
  constructor(maxBytes: number, onDrop?: (value: V) => void) {
    this.#halfBytes = maxBytes / 2;
    this.#onDrop = onDrop;
  }

  get sizeBytes(): number {
    return this.#youngBytes + this.#oldBytes;
  }

  get(key: number): V | undefined {
    const young = this.#young.get(key);
    if (young !== undefined) return young.value;
    const old = this.#old.get(key);
    if (old === undefined) return undefined;
    this.#old.delete(key);
    this.#oldBytes -= old.sizeBytes;
    this.#add(key, old);
    return old.value;
  }

  set(key: number, value: V, sizeBytes: number): void {
    const young = this.#young.get(key);
    if (young !== undefined) {
      this.#youngBytes -= young.sizeBytes;
      this.#onDrop?.(young.value);
    }
    const old = this.#old.get(key);
    if (old !== undefined) {
      this.#old.delete(key);
      this.#oldBytes -= old.sizeBytes;
      this.#onDrop?.(old.value);
    }
    this.#add(key, { value, sizeBytes });
  }

  #add(key: number, entry: Entry<V>): void {
    this.#young.set(key, entry);
    this.#youngBytes += entry.sizeBytes;
    if (this.#youngBytes <= this.#halfBytes) return;
    if (this.#onDrop !== undefined) for (const { value } of this.#old.values()) this.#onDrop(value);
    this.#old = this.#young;
    this.#oldBytes = this.#youngBytes;
    this.#young = new Map();
    this.#youngBytes = 0;
  }
}
