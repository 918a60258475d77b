/**
 * Reads are synchronous; a layer that is not here, or is damaged, ends one with an error. Here the layer is brought back, and the read made again, until
 * it finds everything whole.
 */

import { LayerAbsentError, LayerDamagedError } from './layers/block.ts';

/** Resolves when the layer is whole again, or rejects with why that cannot be. */
export type Repair = (damage: LayerDamagedError) => Promise<void>;

/** Layers that one read may find damaged, one after the other. */
const REPAIRS_MAX = 16;
/** Layers that one read may find absent: each is fetched, and may have been taken away again by the time that the last one is here. */
const FETCHES_MAX = 100_000;

/** Throws what `read` throws; the damage, when it cannot be repaired; what the object store said, when an absent layer cannot be fetched. */
export async function readWhole<T>(read: () => T | Promise<T>, repair: Repair): Promise<T> {
  const bound = new RepairBound(repair);
  for (;;) {
    try {
      return await read();
    } catch (error) {
      if (!(error instanceof LayerDamagedError)) throw error;
      await bound.repair(error);
    }
  }
}

/** The repairs that one read may cause. */
export class RepairBound {
  readonly #repair: Repair;
  #repairCount = 0;
  #fetchCount = 0;

  constructor(repair: Repair) {
    this.#repair = repair;
  }

  async repair(damage: LayerDamagedError): Promise<void> {
    const isAbsent = damage instanceof LayerAbsentError;
    if (isAbsent ? ++this.#fetchCount > FETCHES_MAX : ++this.#repairCount > REPAIRS_MAX) throw damage;
    await this.#repair(damage).catch((error: unknown) => {
      throw isAbsent ? error : damage;
    });
  }
}
