/**
 * What the proxy asks of the control plane: which endpoint a client means, and a running compute behind it.
 */

/** What a client said about where it wants to go. */
export interface EndpointRequest {
  /** Endpoint id from `options=endpoint=…` or from the TLS server name; undefined when the client named none. */
  readonly endpointId: string | undefined;
  readonly user: string;
  readonly database: string;
}

export interface RunningCompute {
  readonly endpointId: string;
  /** The Unix socket that its Postgres listens on. */
  readonly socketPath: string;
}

/** A compute that a client is on its way into. */
export interface Admission extends RunningCompute {
  /**
   * To be called when the client's session is ready, refused or gone; may be called again. Until then the compute is not suspended, but
   * for a bounded time only.
   */
  settled(): void;
}

export interface WakeService {
  /**
   * Resolves when the endpoint's compute accepts connections, waking it if need be.
   * Throws `not-found` (unknown endpoint, or none named where several projects exist), `forbidden` (disabled), `unavailable`, `timeout`.
   */
  wake(request: EndpointRequest, signal: AbortSignal): Promise<Admission>;
}
