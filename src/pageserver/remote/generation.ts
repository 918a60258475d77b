/**
 * A pageserver's generation, and what its data directory remembers of it.
 *
 *   <data dir>/generation    `strata-generation 2 <generation> <since>\n`: of the last pageserver that had this directory and found it up to date, and from which
 *                            generation on every pageserver had it
 *
 * When a new generation is the one after that, no other pageserver was started in between: the local disk is as new as can be, and nothing needs to be asked
 * of the object store. Otherwise the store has the say (first-look.ts).
 *
 * An index of a generation before `since` was taken over from another disk, whose pageserver may be alive and write newer ones of its generation. While it is the newest
 * of its timeline, the next to take over might take one of those, in which may be missing what was promised meanwhile. So each is soon put again under a generation of
 * our own (timeline-upload.ts), and before anything is promised that depends on it.
 */

import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Generations } from '../../api/generations.ts';
import { writeFileDurably } from '../../base/durable-file.ts';
import { StrataError } from '../../base/errors.ts';

const FILE_NAME = 'generation';

export interface KnownGeneration {
  readonly generation: number;
  readonly since: number;
}

/** Undefined when there is none yet. */
export function readGeneration(dataDir: string): KnownGeneration | undefined {
  const path = join(dataDir, FILE_NAME);
  let text: string;
  try {
    text = readFileSync(path, 'latin1');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  // Of version 1, without `since`, as good as nothing is known: the object store is asked.
  if (/^strata-generation 1 \d+\n$/.test(text)) return undefined;
  const match = /^strata-generation 2 (\d+) (\d+)\n$/.exec(text);
  if (match === null) throw new StrataError('internal', `${path} is damaged: remove it, and the object store is asked`);
  return { generation: Number(match[1]), since: Number(match[2]) };
}

export function writeGeneration(dataDir: string, { generation, since }: KnownGeneration): void {
  writeFileDurably(join(dataDir, FILE_NAME), `strata-generation 2 ${generation} ${since}\n`, 0o600);
}

/** Asks whether a generation is the latest. Those who ask while a question is on its way share the next one, which begins after all of them. */
export class GenerationCheck {
  readonly #generations: Generations;
  readonly #generation: number;
  #current: Promise<boolean> | undefined;
  #next: Promise<boolean> | undefined;

  constructor(generations: Generations, generation: number) {
    this.#generations = generations;
    this.#generation = generation;
  }

  /** The answer to a question that is sent after this call. Rejects when it cannot be asked. */
  isLatest(): Promise<boolean> {
    if (this.#current === undefined) return this.#ask();
    this.#next ??= this.#current
      .catch(() => {})
      .then(() => {
        this.#next = undefined;
        return this.#ask();
      });
    return this.#next;
  }

  #ask(): Promise<boolean> {
    const asked: Promise<boolean> = this.#generations.isLatest(this.#generation).finally(() => {
      if (this.#current === asked) this.#current = undefined;
    });
    this.#current = asked;
    return asked;
  }
}
