/**
 * Generations of pageservers, as the supervisor tells of them (base/rpc.ts). What two pageservers write to one object store is kept apart by them: each
 * start of a pageserver gets a generation of its own, higher than all before.
 */
import { RpcClient } from '../base/rpc.ts';

export interface Generations {
  /** A new generation, higher than all that were given out and than `above`. */
  next(above: number): Promise<number>;
  /** Whether none was given out after this one. Asked for to know it *now*: an answer is not to be kept. */
  isLatest(generation: number): Promise<boolean>;
}

export interface GenerationsClientOptions {
  readonly host: string;
  readonly port: number;
  /** Scope `platform`. */
  readonly token: string;
}

const TIMEOUT_MS = 10_000;

/** Each call may reject with `unavailable` or `timeout`. */
export class GenerationsClient implements Generations {
  readonly #rpc: RpcClient;

  constructor(options: GenerationsClientOptions) {
    this.#rpc = new RpcClient({ ...options, service: 'supervisor' });
  }

  async next(above: number): Promise<number> {
    const { result } = await this.#rpc.call('nextGeneration', { above }, { timeoutMs: TIMEOUT_MS });
    return (result as { generation: number }).generation;
  }

  async isLatest(generation: number): Promise<boolean> {
    const { result } = await this.#rpc.call('isLatestGeneration', { generation }, { timeoutMs: TIMEOUT_MS });
    return (result as { isLatest: boolean }).isLatest;
  }

  async close(): Promise<void> {
    await this.#rpc.close();
  }
}
