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
  #young = new Map<number, Entry<V>>();
  #old = new Map<number, Entry<V>>();
  #youngBytes = 0;
  #oldBytes = 0;

  constructor(maxBytes: number) {
    this.#halfBytes = maxBytes / 2;
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
    if (young !== undefined) this.#youngBytes -= young.sizeBytes;
    const old = this.#old.get(key);
    if (old !== undefined) {
      this.#old.delete(key);
      this.#oldBytes -= old.sizeBytes;
    }
    this.#add(key, { value, sizeBytes });
  }

  #add(key: number, entry: Entry<V>): void {
    this.#young.set(key, entry);
    this.#youngBytes += entry.sizeBytes;
    if (this.#youngBytes <= this.#halfBytes) return;
    this.#old = this.#young;
    this.#oldBytes = this.#youngBytes;
    this.#young = new Map();
    this.#youngBytes = 0;
  }
}
