/**
 * What the platform remembers of itself beside projects: the pageserver's generation, which object store is its own, and who the safekeepers are. In the control plane's state,
 * over a connection of its own: the pageserver starts before the control plane and stops after it.
 */
import { join } from 'node:path';
import type { Generations } from '../api/generations.ts';
import type { SafekeeperSet } from '../api/safekeeper-set.ts';
import { StrataError } from '../base/errors.ts';
import type { RpcMethod } from '../base/rpc.ts';
import { State, STATE_FILE_NAME } from './state.ts';

type Configuration = SafekeeperSet['configuration'];

const GENERATION_MAX = 2 ** 32 - 1;

export type SettingName =
  'pageserver-generation' | 'object-store-url' | 'object-store-id' | 'safekeepers' | 'last-safekeeper-id';

export class Settings implements Generations {
  readonly #state: State;

  private constructor(state: State) {
    this.#state = state;
  }

  static open(dataDirectory: string): Settings {
    return new Settings(State.open(join(dataDirectory, STATE_FILE_NAME)));
  }

  close(): void {
    this.#state.close();
  }

  get(name: SettingName): string | undefined {
    return this.#state.get<{ value: string }>('SELECT value FROM settings WHERE name = ?', name)?.value;
  }

  /** Durable when it returns. */
  set(name: SettingName, value: string): void {
    this.#state.run(
      'INSERT INTO settings (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value',
      name,
      value,
    );
  }

  /** Durable before it is given out. */
  async next(above: number): Promise<number> {
    if (!Number.isInteger(above) || above < 0 || above >= GENERATION_MAX) {
      throw new StrataError('bad-request', `${above} is not a generation that another can come after`);
    }
    return this.#state.transaction(() => {
      const generation = Math.max(this.#generation(), above) + 1;
      this.set('pageserver-generation', String(generation));
      return generation;
    });
  }

  async isLatest(generation: number): Promise<boolean> {
    return this.#generation() === generation;
  }

  /** The newest configuration of the safekeepers; undefined before the first start. */
  get safekeepers(): Configuration | undefined {
    const value = this.get('safekeepers');
    return value === undefined ? undefined : (JSON.parse(value) as Configuration);
  }

  /** True, and durable, when the configuration was still of the expected version, 0 when there was none. So each version has one content. */
  replaceSafekeepers(expectedVersion: number, next: Configuration): boolean {
    return this.#state.transaction(() => {
      if ((this.safekeepers?.version ?? 0) !== expectedVersion) return false;
      this.set('safekeepers', JSON.stringify(next));
      const lastId = Math.max(Number(this.get('last-safekeeper-id') ?? 0), ...next.members, ...(next.newMembers ?? []));
      this.set('last-safekeeper-id', String(lastId));
      return true;
    });
  }

  /** Ids that no safekeeper has ever had. */
  newSafekeeperIds(count: number): number[] {
    const lastId = Number(this.get('last-safekeeper-id') ?? 0);
    return Array.from({ length: count }, (_, index) => lastId + 1 + index);
  }

  #generation(): number {
    return Number(this.get('pageserver-generation') ?? 0);
  }
}

/** The calls of api/generations.ts. */
export function generationMethods(generations: Generations): Record<string, RpcMethod> {
  return {
    nextGeneration: async ({ above }: { above: number }) => ({ result: { generation: await generations.next(above) } }),
    isLatestGeneration: async ({ generation }: { generation: number }) => ({
      result: { isLatest: await generations.isLatest(generation) },
    }),
  };
}
