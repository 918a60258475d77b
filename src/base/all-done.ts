/**
 * Things done at the same time, of which none may go on when the others have failed: who cleans up after a failure would meet it.
 */

/** Resolves when all have; rejects, when the last has ended, with what the first of the list that failed rejected with. */
export async function allDone(work: readonly Promise<unknown>[]): Promise<void> {
  const settled = await Promise.allSettled(work);
  for (const each of settled) if (each.status === 'rejected') throw each.reason;
}

/** Has `work` done for each item, in order, `limit` at a time. After a failure no other is begun, and it rejects as `allDone` does. */
export async function forEachLimited<T>(
  items: Iterable<T>,
  limit: number,
  work: (item: T) => Promise<void>,
): Promise<void> {
  const left = items[Symbol.iterator]();
  let hasFailed = false;
  const workOn = async (): Promise<void> => {
    for (let next = left.next(); next.done !== true && !hasFailed; next = left.next()) {
      await work(next.value).catch((error: unknown) => {
        hasFailed = true;
        throw error;
      });
    }
  };
  await allDone(Array.from({ length: limit }, workOn));
}
