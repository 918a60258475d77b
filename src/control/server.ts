/**
 * The HTTP server: keys, request ids, errors and limits of the API, which is under /api/v2; GET /health says whether the platform is ready.
 *
 * Errors have Neon's body {request_id, code, message}. A request before the platform is ready is answered 503.
 */
import { randomUUID } from 'node:crypto';
import fastify, { type FastifyError, type FastifyInstance, type FastifyReply, type FastifyRequest } from 'fastify';
import type { SafekeeperAdmin } from '../api/control.ts';
import { StrataError, errorTable, toStrataError } from '../base/errors.ts';
import type { Control } from './control.ts';
import { registerRoutes } from './routes.ts';
import { registerSafekeepers } from './safekeeper-routes.ts';

const BODY_LIMIT_BYTES = 1024 * 1024;
const REQUEST_TIMEOUT_MS = 60_000;
const REQUEST_ID = /^[A-Za-z0-9._-]{1,128}$/;

export interface ApiServerOptions {
  readonly control: Control;
  /** Without it there are no routes for the safekeepers. */
  readonly safekeepers?: SafekeeperAdmin;
  /** Asked at each request. */
  readonly isReady: () => boolean;
}

/** Not listening yet: `await server.listen({ host, port })`. */
export function createApiServer(options: ApiServerOptions): FastifyInstance {
  const { control, isReady } = options;
  const server = fastify({
    bodyLimit: BODY_LIMIT_BYTES,
    requestTimeout: REQUEST_TIMEOUT_MS,
    forceCloseConnections: true,
    genReqId: (request) => {
      const given = request.headers['x-request-id'];
      return typeof given === 'string' && REQUEST_ID.test(given) ? given : randomUUID();
    },
    ajv: { customOptions: { coerceTypes: false, removeAdditional: false, verbose: true, allowUnionTypes: true } },
    schemaErrorFormatter: (errors, part) => new StrataError('bad-request', describeInvalid(errors[0], part)),
  });
  readBodies(server);
  server.setErrorHandler((error: FastifyError, request, reply) => sendError(control, error, request, reply));
  server.setNotFoundHandler((request, reply) => {
    const path = request.url.split('?')[0];
    return sendError(
      control,
      new StrataError('not-found', `there is no ${request.method} ${path} here`),
      request,
      reply,
    );
  });

  server.get('/health', (_request, reply) => {
    const ready = isReady();
    return reply.code(ready ? 200 : 503).send({ status: ready ? 'ready' : 'starting' });
  });
  server.register(
    async (api) => {
      api.addHook('onRequest', async (request) => {
        if (!isReady()) throw new StrataError('unavailable', 'the platform is starting: try again in a moment');
        control.apiKeys.authenticate(request.headers.authorization, request.ip);
      });
      if (options.safekeepers !== undefined) registerSafekeepers(api, options.safekeepers);
      registerRoutes(api, control);
    },
    { prefix: '/api/v2' },
  );
  return server;
}

/** Bodies are JSON. Where there is none, clients send any content type (axios says it is a form). */
function readBodies(server: FastifyInstance): void {
  server.removeAllContentTypeParsers();
  server.addContentTypeParser('*', { parseAs: 'string' }, (request, text, done) => {
    if (text === '') return done(null, undefined);
    const type = request.headers['content-type'] ?? 'none';
    if (!/^application\/json\b/i.test(type)) {
      return done(new StrataError('bad-request', `content type ${type} is not supported: send application/json`));
    }
    try {
      done(null, JSON.parse(text as string));
    } catch (error) {
      // The parser's message quotes the body, which may hold anything.
      done(new StrataError('bad-request', 'the body is not valid JSON', { cause: error }));
    }
  });
}

function sendError(control: Control, thrown: FastifyError | StrataError, request: FastifyRequest, reply: FastifyReply) {
  const error = asStrataError(thrown);
  const status = errorTable[error.code].httpStatus;
  if (status >= 500 && error.code !== 'not-implemented') {
    const route = `${request.method} ${request.routeOptions.url ?? 'unknown route'}`;
    control.context.log.error({ err: error, requestId: request.id }, `${route} failed`);
  }
  const code = error.code.toUpperCase().replaceAll('-', '_');
  return reply.code(status).send({ request_id: request.id, code, message: error.message });
}

/** Fastify's own refusals (body too large, unknown content type, …) carry a status below 500. */
function asStrataError(thrown: FastifyError | StrataError): StrataError {
  if (thrown instanceof StrataError) return thrown;
  if (thrown.statusCode !== undefined && thrown.statusCode < 500) return new StrataError('bad-request', thrown.message);
  return toStrataError(thrown);
}

interface InvalidValue {
  readonly instancePath?: string;
  readonly message?: string;
  readonly data?: unknown;
  readonly params?: Readonly<Record<string, unknown>>;
  readonly keyword?: string;
  readonly parentSchema?: { readonly description?: string };
}

/** `project.pg_version must be integer, not "x"`. */
function describeInvalid(error: InvalidValue | undefined, part: string): string {
  if (error === undefined) return `the ${part} is not as it should be`;
  const path = (error.instancePath ?? '').slice(1).replaceAll('/', '.');
  const where = path === '' ? `the ${part === 'querystring' ? 'query' : part}` : path;
  const allowed = error.params?.['allowedValues'];
  const described = error.keyword === 'pattern' ? error.parentSchema?.description : undefined;
  const expected = Array.isArray(allowed)
    ? `must be one of ${allowed.join(', ')}`
    : described === undefined
      ? (error.message ?? 'is not valid')
      : `must be ${described}`;
  if (error.params?.['missingProperty'] !== undefined) return `${where} ${expected}`;
  return `${where} ${expected}, not ${abbreviate(error.data)}`;
}

function abbreviate(value: unknown): string {
  const text = JSON.stringify(value) ?? 'nothing';
  return text.length > 100 ? `${text.slice(0, 100)}…` : text;
}
