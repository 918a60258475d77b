/**
 * What every part of the control plane is given: the state, the world outside, the clock, and the platform's configuration.
 */
import type { Computes, Storage } from '../api/control.ts';
import type { Logger } from '../base/log.ts';
import type { Operations } from './operations.ts';
import type { SecretBox } from './secrets.ts';
import type { State } from './state.ts';

export interface ControlConfig {
  /** Where clients reach the proxy. */
  readonly proxyHost: string;
  readonly proxyPort: number;
  /** `<endpoint id>.<domain>` is an endpoint's host name; for clients that route by TLS server name. */
  readonly domain: string;
  readonly defaultPgVersion: number;
  /** The majors that there are binaries for. */
  readonly availablePgVersions: readonly number[];
  /** For endpoints that do not say; -1: never suspend. */
  readonly suspendTimeoutSeconds: number;
}

export interface ControlContext {
  readonly state: State;
  readonly storage: Storage;
  readonly computes: Computes;
  readonly operations: Operations;
  readonly secrets: SecretBox;
  readonly config: ControlConfig;
  /** Milliseconds since 1970. */
  readonly now: () => number;
  readonly log: Logger;
}
