/**
 * Suspends endpoints that are idle: samples every active compute now and then and acts on what suspend.ts decides. Endpoints do not wait for each other:
 * one whose compute does not answer is looked at again when that look is over.
 */
import type { ControlContext } from './context.ts';
import type { Endpoints } from './endpoints.ts';
import type { EndpointRow } from './state.ts';
import { decideSuspend, effectiveSuspendTimeout, NEVER_SUSPEND, type SuspendDecision } from './suspend.ts';

const POLL_INTERVAL_MS = 2000;
/** `last_active` is written when it moved by this much: it informs people, and each write is an fsync. */
const LAST_ACTIVE_STEP_MS = 60_000;

export class IdleMonitor {
  readonly #context: ControlContext;
  readonly #endpoints: Endpoints;
  readonly #lastActiveMs = new Map<string, number>();
  #timer: NodeJS.Timeout | undefined;
  /** By endpoint: looks that are not over. */
  readonly #looks = new Map<string, Promise<void>>();

  constructor(context: ControlContext, endpoints: Endpoints) {
    this.#context = context;
    this.#endpoints = endpoints;
  }

  start(intervalMs: number = POLL_INTERVAL_MS): void {
    this.#timer = setInterval(() => {
      this.poll().catch((error: unknown) =>
        this.#context.log.error({ err: error }, 'looking for idle endpoints failed'),
      );
    }, intervalMs);
    this.#timer.unref();
  }

  async close(): Promise<void> {
    clearInterval(this.#timer);
    await Promise.allSettled(this.#looks.values());
  }

  /** One look at every active endpoint but those that an earlier look is still at. */
  async poll(): Promise<void> {
    const active = this.#endpoints.active();
    const ids = new Set(active.map((endpoint) => endpoint.id));
    for (const id of this.#lastActiveMs.keys()) if (!ids.has(id)) this.#lastActiveMs.delete(id);
    const free = active.filter((endpoint) => !this.#looks.has(endpoint.id));
    await Promise.all(
      free.map((endpoint) => {
        const look = this.#look(endpoint).finally(() => this.#looks.delete(endpoint.id));
        this.#looks.set(endpoint.id, look);
        return look;
      }),
    );
  }

  async #look(endpoint: EndpointRow): Promise<void> {
    if (this.#context.computes.running(endpoint.id) === undefined) {
      this.#endpoints.noteStopped(endpoint.id);
      return;
    }
    const decision = await this.#decide(endpoint);
    if (decision.kind === 'stay') return;
    const suspended = await this.#endpoints.suspendIf(
      endpoint.id,
      async () => (await this.#decide(endpoint)).kind === 'suspend',
    );
    if (suspended) this.#context.log.info({ endpointId: endpoint.id }, 'idle endpoint suspended');
  }

  async #decide(endpoint: EndpointRow): Promise<SuspendDecision> {
    const { computes, config, now, log } = this.#context;
    const timeoutSeconds = effectiveSuspendTimeout(endpoint.suspend_timeout_seconds, config.suspendTimeoutSeconds);
    const lastActiveMs = this.#lastActiveMs.get(endpoint.id) ?? endpoint.started_at ?? now();
    if (timeoutSeconds === NEVER_SUSPEND) return { kind: 'stay', lastActiveMs };
    const sample = await computes.activity(endpoint.id).catch((error: unknown) => {
      log.debug({ endpointId: endpoint.id, err: error }, 'a compute could not be asked what it does');
      return undefined;
    });
    const decision = decideSuspend({ nowMs: now(), lastActiveMs, timeoutSeconds, sample });
    this.#lastActiveMs.set(endpoint.id, decision.lastActiveMs);
    if (decision.lastActiveMs - (endpoint.last_active ?? 0) >= LAST_ACTIVE_STEP_MS) {
      this.#context.state.update('endpoints', endpoint.id, { last_active: decision.lastActiveMs });
    }
    return decision;
  }
}
