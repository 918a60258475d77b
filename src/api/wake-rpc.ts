/**
 * WakeService over remote calls (base/rpc.ts): the proxy, in a process of its own, asks the supervisor.
 *
 *   admit {id, request} → {endpointId, socketPath}   the caller chooses the id, new for each client
 *   leave {id}                                       the client is in, refused or gone; ends an `admit` that is under way
 *
 * A connection that is lost takes all its clients along.
 */
import { randomUUID } from 'node:crypto';
import { RpcClient, type RpcContext, type RpcMethod } from '../base/rpc.ts';
import { StrataError } from '../base/errors.ts';
import type { Admission, EndpointRequest, RunningCompute, WakeService } from './wake.ts';

/** More than a wake may take; the service ends those that take too long. */
const TIMEOUT_MS = 600_000;

export interface WakeClientOptions {
  readonly host: string;
  readonly port: number;
  /** Scope `platform`. */
  readonly token: string;
}

export class WakeClient implements WakeService {
  readonly #rpc: RpcClient;

  constructor(options: WakeClientOptions) {
    this.#rpc = new RpcClient({ ...options, service: 'supervisor' });
  }

  async wake(request: EndpointRequest, signal: AbortSignal): Promise<Admission> {
    const id = randomUUID();
    let hasLeft = false;
    const leave = (): void => {
      if (hasLeft) return;
      hasLeft = true;
      this.#rpc.call('leave', { id }).catch(() => {}); // Then the connection is gone, and the service knows that.
    };
    try {
      const { result } = await this.#rpc.call('admit', { id, request }, { signal, timeoutMs: TIMEOUT_MS });
      return { ...(result as RunningCompute), settled: leave };
    } catch (error) {
      leave();
      throw error;
    }
  }

  async close(): Promise<void> {
    await this.#rpc.close();
  }
}

interface Client {
  readonly gone: AbortController;
  admission: Admission | undefined;
}

/** What the supervisor answers. `service` may still be on its way: clients wait. */
export function wakeMethods(service: Promise<WakeService>): Readonly<Record<'admit' | 'leave', RpcMethod>> {
  /** By connection, of which the signal is one's own. */
  const connections = new WeakMap<AbortSignal, Map<string, Client>>();
  const clientsOf = ({ signal }: RpcContext): Map<string, Client> => {
    const known = connections.get(signal);
    if (known !== undefined) return known;
    const clients = new Map<string, Client>();
    connections.set(signal, clients);
    signal.addEventListener('abort', () => {
      for (const id of clients.keys()) leave(clients, id);
    });
    return clients;
  };
  const leave = (clients: Map<string, Client>, id: string): void => {
    const client = clients.get(id);
    clients.delete(id);
    client?.gone.abort();
    client?.admission?.settled();
  };
  return {
    admit: async ({ id, request }: { id: string; request: EndpointRequest }, context) => {
      const clients = clientsOf(context);
      const client: Client = { gone: new AbortController(), admission: undefined };
      clients.set(id, client);
      try {
        const admission = await (await service).wake(request, client.gone.signal);
        client.admission = admission;
        if (clients.get(id) !== client) {
          admission.settled();
          throw new StrataError('unavailable', 'the client has left');
        }
        const { endpointId, socketPath } = admission;
        return { result: { endpointId, socketPath } satisfies RunningCompute };
      } catch (error) {
        clients.delete(id);
        throw error;
      }
    },
    leave: ({ id }: { id: string }, context) => {
      leave(clientsOf(context), id);
      return { result: null };
    },
  };
}
