/**
 * What a client says before authentication, and where it wants to go.
 * Format: https://www.postgresql.org/docs/17/protocol-message-formats.html (StartupMessage) and libpq's `options` parameter.
 */
import { StrataError } from '../base/errors.ts';

export interface Target {
  readonly endpointId: string | undefined;
  readonly user: string;
  readonly database: string;
  /** The startup parameters to send to Postgres: those of the client without what was meant for the proxy. */
  readonly parameters: ReadonlyMap<string, string>;
}

const ENDPOINT_ID = /^[a-z0-9-]{1,60}$/;
const POOLER_SUFFIX = '-pooler';

/** `serverName` is the TLS server name, when there was one. Throws `bad-request` when names contradict each other or are malformed. */
export function findTarget(parameters: ReadonlyMap<string, string>, serverName: string | undefined): Target {
  const user = parameters.get('user');
  if (user === undefined || user === '') throw new StrataError('bad-request', 'the connection names no user');
  const { endpointId: fromOptions, rest } = splitOptions(parameters.get('options') ?? '');
  const fromName = endpointOfServerName(serverName);
  if (fromOptions !== undefined && fromName !== undefined && fromOptions !== fromName) {
    throw new StrataError(
      'bad-request',
      `options name the endpoint "${fromOptions}" but the host name says "${fromName}"`,
    );
  }
  const passed = new Map(parameters);
  passed.delete('options');
  if (rest !== '') passed.set('options', rest);
  return {
    endpointId: fromOptions ?? fromName,
    user,
    database: parameters.get('database') ?? user,
    parameters: passed,
  };
}

/** Takes `endpoint=<id>` (or `-c endpoint=<id>`, or `project=<id>`) out of libpq's options string, whose words may be escaped by backslashes. */
function splitOptions(options: string): { endpointId: string | undefined; rest: string } {
  const words = options.match(/(?:\\.|[^\s\\])+/g) ?? [];
  const rest: string[] = [];
  let endpointId: string | undefined;
  for (const word of words) {
    const match = /^(?:-c)?(?:endpoint|project)=(.*)$/.exec(word);
    if (match === null) {
      rest.push(word);
      continue;
    }
    if (rest.at(-1) === '-c') rest.pop();
    const id = (match[1] ?? '').replace(/-pooler$/, '');
    if (!ENDPOINT_ID.test(id)) throw new StrataError('bad-request', `"${id}" is not an endpoint id`);
    if (endpointId !== undefined && endpointId !== id) {
      throw new StrataError('bad-request', `the options name two endpoints, "${endpointId}" and "${id}"`);
    }
    endpointId = id;
  }
  return { endpointId, rest: rest.join(' ') };
}

function endpointOfServerName(serverName: string | undefined): string | undefined {
  const label = serverName?.split('.')[0];
  if (label === undefined || !label.startsWith('ep-') || !serverName?.includes('.')) return undefined;
  return label.endsWith(POOLER_SUFFIX) ? label.slice(0, -POOLER_SUFFIX.length) : label;
}
