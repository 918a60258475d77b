/**
 * Connection strings. The endpoint is named in `options`, so that they work on any host without name resolution; sslmode=require takes the
 * platform's self-signed certificate.
 */
export interface ConnectionParts {
  readonly host: string;
  readonly port: number;
  readonly role: string;
  readonly password: string;
  readonly database: string;
  readonly endpointId: string;
}

export function connectionUri(parts: ConnectionParts): string {
  const user = `${encodeURIComponent(parts.role)}:${encodeURIComponent(parts.password)}`;
  const host = parts.host.includes(':') ? `[${parts.host}]` : parts.host;
  const database = encodeURIComponent(parts.database);
  return `postgresql://${user}@${host}:${parts.port}/${database}?sslmode=require&options=endpoint%3D${parts.endpointId}`;
}
