/**
 * The steps of every change on disk and in the object store, by name: between any two of them a process may die. Whoever takes one says so, and the crash tests
 * (crash.test.ts, repair.test.ts, remote/crash.test.ts) kill a pageserver at each, in every run; a step that is named here and never reached fails them, and one that is not
 * named here is no `Step`.
 *
 * A step is called when what it names has just been done, or, where it says so ("begins"), is about to be.
 */

/** On the pageserver's disk. */
export const LOCAL_STEPS = [
  'import folder made',
  'imported layers written',
  'timeline folder made',
  'timeline created',
  'bulk layers written',
  'flush begins',
  'layer written',
  'index written',
  'compaction begins',
  'compacted layers written',
  'compacted index written',
  'compacted layer removed',
  'horizon written',
  'timeline deleted',
  'timeline folder removed',
] as const;

/** Of a layer that is made anew from WAL; then those of a merge, from 'compacted index written' on. */
export const REPAIR_STEPS = [
  'shadow made',
  'shadow flushed',
  'layer taken over',
  'layers taken over',
  'shadow removed',
] as const;

/** In the object store, and on the disk because of it. */
export const REMOTE_STEPS = [
  'generation taken',
  'local timeline removed',
  'other layers removed',
  'index taken',
  'generation written',
  'layer uploaded',
  'index uploaded',
  'remote index kept',
  'generation confirmed',
  'objects deleted',
  'tombstone uploaded',
  'layer fetched',
] as const;

export type Step = (typeof LOCAL_STEPS | typeof REPAIR_STEPS | typeof REMOTE_STEPS)[number];

/** For tests: called at each step; what it throws ends the work, as a death there would. */
export type OnStep = (step: Step) => void;
