/** For tests: what crash-writer.ts has left on disk, against the model. */

import assert from 'node:assert/strict';
import { readdirSync } from 'node:fs';
import { createLog } from '../../src/base/log.ts';
import { ALL_KEYS, KEY_KIND } from '../../src/pageserver/key.ts';
import type { Key } from '../../src/pageserver/key.ts';
import { layerFileName } from '../../src/pageserver/layers/layer-format.ts';
import type { Timeline } from '../../src/pageserver/timeline.ts';
import { Timelines } from '../../src/pageserver/timelines.ts';
import { encodeImage } from '../../src/pageserver/value.ts';
import { IMPORTED, putsOf, RECORD_BYTES, ROOT, START_LSN } from './crash-writer.ts';
import { ModelTimeline, replayPoke } from './history-model.ts';

export function newModel(): ModelTimeline {
  const model = new ModelTimeline(START_LSN);
  for (const [key, image] of IMPORTED) model.puts.push({ key, lsn: START_LSN, value: encodeImage(image) });
  return model;
}

/** Gives the model the records that a writer writes up to `lsn`. */
export function bringOn(model: ModelTimeline, seed: number, lsn: number): void {
  while (model.lastRecordLsn < lsn) {
    model.lastRecordLsn += RECORD_BYTES;
    for (const [key, value] of putsOf(seed, model.lastRecordLsn)) {
      model.puts.push({ key, lsn: model.lastRecordLsn, value });
    }
  }
}

/** At which the states are compared: the oldest, one between, and the newest. */
export function sampledLsns({ oldestLsn, lastRecordLsn }: Timeline): number[] {
  return [oldestLsn, oldestLsn + Math.floor((lastRecordLsn - oldestLsn) / 3), lastRecordLsn];
}

export interface LeftStore {
  readonly seed: number;
  /** The last that the writer was told is durable. */
  readonly confirmedLsn: number;
  /** Brought on to where the store is. */
  readonly model: ModelTimeline;
  readonly what: string;
}

/** The state at some record at or past what was confirmed, whole, with no file that belongs to nothing. */
export async function checkStore(directory: string, { seed, confirmedLsn, model, what }: LeftStore): Promise<void> {
  const log = createLog({ name: 'test', level: 'error' });
  const timelines = await Timelines.open(directory, { replay: replayPoke, log });
  assert.equal(timelines.broken.size, 0);
  for (const { directory: folder, index } of timelines.all()) {
    const named = index.layers.map((layer) => layerFileName(layer));
    assert.deepEqual(readdirSync(folder).sort(), [...named, 'index'].sort());
  }
  const root = timelines.find(ROOT);
  if (root === undefined) {
    assert.equal(confirmedLsn, START_LSN, 'the import did not end');
    return timelines.close();
  }
  const lsn = root.lastRecordLsn;
  assert(lsn >= confirmedLsn, `${what}: ${lsn} is there, ${confirmedLsn} was confirmed`);
  bringOn(model, seed, lsn);
  for (const at of sampledLsns(root)) {
    assert.deepEqual(
      readable(root.scan(ALL_KEYS, at)),
      readable(model.scan(ALL_KEYS, at)),
      `${what}: the state at ${at}`,
    );
  }
  for (const branch of timelines.all()) {
    if (branch !== root) assert.equal(branch.ancestor, root);
  }
  // What a child inherits is what the model had there.
  const branch = [...timelines.all()].find(
    (timeline) => timeline !== root && timeline.isVisible(timeline.index.startLsn),
  );
  if (branch !== undefined) {
    const at = branch.index.startLsn;
    assert.deepEqual(readable(branch.scan(ALL_KEYS, at)), readable(model.scan(ALL_KEYS, at)), what);
  }
  await timelines.close();
}

/** Blocks past their fork's end are nobody's to read, and go with what is collected. */
function readable(entries: [Key, Buffer][]): [Key, Buffer][] {
  const sizes = new Map(entries.map(([key, image]) => [key.kind * 2 ** 32 + key.rel, image]));
  return entries.filter(([{ kind, rel, blk }]) => {
    const size = sizes.get(KEY_KIND.relationSize * 2 ** 32 + rel)?.readUInt32LE(0) ?? 0;
    return kind !== KEY_KIND.relationBlock || blk < size;
  });
}
