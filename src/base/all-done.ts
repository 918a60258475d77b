/**
 * Things done at the same time, of which none may go on when the others have failed: who cleans up after a failure would meet it.
 */

/** Resolves when all have; rejects, when the last has ended, with what the first to fail rejected with. */
export async function allDone(work: readonly Promise<unknown>[]): Promise<void> {
  const settled = await Promise.allSettled(work);
  for (const each of settled) if (each.status === 'rejected') throw each.reason;
}
