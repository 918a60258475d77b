/** The proxy as a process of its own: what it relays takes no time from who makes commits durable, and the other way round. */
import { WakeClient } from '../api/wake-rpc.ts';
import type { Logger } from '../base/log.ts';
import { signToken } from '../base/token.ts';
import type { Certificate } from './certificate.ts';
import { startProxy } from './proxy.ts';

export interface ProxyConfig {
  readonly host: string;
  readonly port: number;
  readonly certificate: Certificate;
  /** Who wakes endpoints. */
  readonly supervisor: { readonly host: string; readonly port: number };
  readonly refusedRoles: readonly string[];
  /** Of the platform; signs tokens. */
  readonly secret: Uint8Array;
  readonly log: Logger;
}

export interface ProxyService {
  readonly port: number;
  /** Disconnects everybody and stops. */
  close(): Promise<void>;
}

/** Resolves when clients can connect. */
export async function runProxy(config: ProxyConfig): Promise<ProxyService> {
  const { supervisor, secret, ...options } = config;
  const wakeService = new WakeClient({ ...supervisor, token: await signToken(secret, { scope: 'platform' }) });
  const proxy = await startProxy({ ...options, wakeService });
  return {
    port: proxy.port,
    close: async () => {
      await proxy.close();
      await wakeService.close();
    },
  };
}
