import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import type { FastifyInstance } from 'fastify';
import { StrataError } from '../base/errors.ts';
import { World } from './fake-world.ts';
import { createApiServer } from './server.ts';

type Json = Record<string, unknown>;

class Api implements AsyncDisposable {
  readonly world = new World();
  ready = true;
  readonly server: FastifyInstance = createApiServer({ control: this.world.control, isReady: () => this.ready });
  readonly key = readFileSync(join(this.world.dataDirectory, 'api-key'), 'utf8').trim();

  async call(
    method: 'GET' | 'POST' | 'PATCH' | 'DELETE',
    path: string,
    body?: unknown,
    headers: Record<string, string> = {},
  ) {
    const response = await this.server.inject({
      method,
      url: `/api/v2${path}`,
      headers: {
        authorization: `Bearer ${this.key}`,
        ...(body === undefined ? {} : { 'content-type': 'application/json' }),
        ...headers,
      },
      ...(body === undefined ? {} : { payload: JSON.stringify(body) }),
    });
    assert.match(String(response.headers['content-type']), /^application\/json/, `${method} ${path}`);
    return { status: response.statusCode, body: response.json<Json>() };
  }

  /** The body of a call that must succeed with the status. */
  async ok(status: number, ...call: Parameters<Api['call']>): Promise<Json> {
    const response = await this.call(...call);
    assert.equal(response.status, status, JSON.stringify(response.body));
    return response.body;
  }

  /** The error of a call that must fail with the status, with the words in its message. */
  async refused(status: number, words: string[], ...call: Parameters<Api['call']>): Promise<Json> {
    const { status: actual, body } = await this.call(...call);
    assert.equal(actual, status, JSON.stringify(body));
    assert.deepEqual(Object.keys(body).sort(), ['code', 'message', 'request_id']);
    for (const word of words)
      assert(String(body['message']).includes(word), `"${String(body['message'])}" says ${word}`);
    return body;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.server.close();
    await this.world[Symbol.asyncDispose]();
  }
}

function at(json: unknown, ...path: (string | number)[]): unknown {
  return path.reduce<unknown>((value, key) => (value as Record<string | number, unknown>)[key], json);
}

/** The required fields of Neon's entities. */
const FIELDS = {
  project:
    'data_storage_bytes_hour data_transfer_bytes written_data_bytes compute_time_seconds active_time_seconds cpu_used_sec id platform_id region_id ' +
    'name provisioner pg_version proxy_host branch_logical_size_limit branch_logical_size_limit_bytes store_passwords creation_source ' +
    'history_retention_seconds created_at updated_at consumption_period_start consumption_period_end owner_id',
  projectListItem:
    'id platform_id region_id name provisioner pg_version proxy_host branch_logical_size_limit branch_logical_size_limit_bytes store_passwords ' +
    'active_time cpu_used_sec creation_source created_at updated_at owner_id',
  branch:
    'id project_id name current_state state_changed_at creation_source default protected cpu_used_sec compute_time_seconds active_time_seconds ' +
    'written_data_bytes data_transfer_bytes created_at updated_at',
  endpoint:
    'host id project_id branch_id autoscaling_limit_min_cu autoscaling_limit_max_cu region_id type current_state settings pooler_enabled pooler_mode ' +
    'disabled passwordless_access creation_source created_at updated_at proxy_host suspend_timeout_seconds provisioner',
  role: 'branch_id name created_at updated_at',
  database: 'id branch_id name owner_name created_at updated_at',
  operation: 'id project_id action status failures_count created_at updated_at total_duration_ms',
};

function hasFields(entity: unknown, kind: keyof typeof FIELDS): void {
  for (const field of FIELDS[kind].split(' ')) assert.notEqual(at(entity, field), undefined, `${kind}.${field}`);
}

test('health follows readiness, and the API waits for it', async () => {
  await using api = new Api();
  api.ready = false;
  assert.equal((await api.server.inject('/health')).statusCode, 503);
  await api.refused(503, ['starting'], 'GET', '/projects');
  api.ready = true;
  assert.equal((await api.server.inject('/health')).statusCode, 200);
  await api.ok(200, 'GET', '/projects');
});

test('requests without a known key are refused, whatever they ask', async () => {
  await using api = new Api();
  for (const authorization of ['', 'Bearer nonsense', api.key]) {
    const error = await api.refused(401, ['Authorization'], 'GET', '/projects', undefined, { authorization });
    assert(!String(error['message']).includes('nonsense'));
  }
  const unknown = await api.server.inject('/api/v2/projects/x/branches');
  assert.equal(unknown.statusCode, 401);
});

test('a project is created, shown, listed, renamed and deleted with all the fields that clients need', async () => {
  await using api = new Api();
  const created = await api.ok(201, 'POST', '/projects', { project: { name: 'shop', pg_version: 17, branch: {} } });
  hasFields(created['project'], 'project');
  hasFields(created['branch'], 'branch');
  hasFields(at(created, 'endpoints', 0), 'endpoint');
  hasFields(at(created, 'roles', 0), 'role');
  hasFields(at(created, 'databases', 0), 'database');
  hasFields(at(created, 'operations', 0), 'operation');
  const id = String(at(created, 'project', 'id'));
  const password = String(at(created, 'roles', 0, 'password'));
  const endpoint = String(at(created, 'endpoints', 0, 'id'));
  assert.equal(
    at(created, 'connection_uris', 0, 'connection_uri'),
    `postgresql://stratadb_owner:${password}@127.0.0.1:55432/stratadb?sslmode=require&options=endpoint%3D${endpoint}`,
  );
  assert.equal(at(created, 'connection_uris', 0, 'connection_parameters', 'host'), `${endpoint}.localhost:55432`);

  const list = await api.ok(200, 'GET', '/projects?limit=100');
  hasFields(at(list, 'projects', 0), 'projectListItem');
  assert.deepEqual([list['applications'], list['integrations']], [{}, {}]);
  assert.deepEqual((await api.ok(200, 'GET', '/projects/shared?limit=100'))['projects'], []);
  const renamed = await api.ok(200, 'PATCH', `/projects/${id}`, { project: { name: 'store' } });
  assert.equal(at(renamed, 'project', 'name'), 'store');
  assert.deepEqual(renamed['operations'], []);
  assert.equal(at(await api.ok(200, 'GET', `/projects/${id}`), 'project', 'name'), 'store');
  await api.ok(200, 'DELETE', `/projects/${id}`);
  await api.refused(404, [id], 'GET', `/projects/${id}`);
  await api.refused(404, [id], 'DELETE', `/projects/${id}`);
});

test('names of branch, role and database can be chosen', async () => {
  await using api = new Api();
  const branch = { name: 'trunk', role_name: 'alice', database_name: 'books' };
  const created = await api.ok(201, 'POST', '/projects', { project: { branch } });
  assert.equal(at(created, 'branch', 'name'), 'trunk');
  assert.match(
    String(at(created, 'connection_uris', 0, 'connection_uri')),
    /^postgresql:\/\/alice:\w+@127.0.0.1:55432\/books\?/,
  );
  assert.equal(at(created, 'project', 'name'), at(created, 'project', 'id'));
});

test('what branches take is shown, and storage learns how long history is kept', async () => {
  await using api = new Api();
  const created = await api.ok(201, 'POST', '/projects', { project: { history_retention_seconds: 86_400 } });
  const projectId = String(at(created, 'project', 'id'));
  const { branches } = await api.ok(200, 'GET', `/projects/${projectId}/storage`);
  const names = 'branch_id name logical_size history_size shared_with_parent_size freed_by_deletion_size oldest_lsn';
  for (const field of names.split(' ')) assert.notEqual(at(branches, 0, field), undefined, field);
  assert.deepEqual([...api.world.storage.retentions.values()], [86_400]);
  await api.ok(200, 'PATCH', `/projects/${projectId}`, { project: { history_retention_seconds: 172_800 } });
  assert.deepEqual([...api.world.storage.retentions.values()], [172_800]);
});

test('what is wrong with a request is said with its value', async () => {
  await using api = new Api();
  const post = async (words: string[], body: unknown) => api.refused(400, words, 'POST', '/projects', body);
  await post(['project.pg_version', '"17"'], { project: { pg_version: '17' } });
  await post(['pg_version 99', 'available: 17'], { project: { pg_version: 99 } });
  for (const seconds of [0, 3600, 2_592_001]) {
    const limit = seconds < 21_600 ? '21600' : '2592000';
    const project = { history_retention_seconds: seconds };
    await post(['project.history_retention_seconds', String(seconds), limit], { project });
  }
  await post(['project.name', '12'], { project: { name: 12 } });
  await post(['project.branch.role_name', '63'], { project: { branch: { role_name: 'x'.repeat(64) } } });
  for (const name of ['pg_x', 'strata_admin', 'strata_owner', 'public', 'none']) {
    await post([`"${name}"`, 'reserved'], { project: { branch: { role_name: name } } });
  }
  for (const name of ['postgres', 'template0', 'template1']) {
    await post([`"${name}"`, 'choose another'], { project: { branch: { database_name: name } } });
  }
  await post(['64 bytes', 'shorter'], { project: { branch: { role_name: 'я'.repeat(32) } } });
  await post(['64 bytes', 'shorter'], { project: { branch: { database_name: 'я'.repeat(32) } } });
  for (const name of ['two\nlines', 'a\u007f', ' ', '\u2028']) {
    await post(['project.name must be a name without control characters'], { project: { name } });
  }
  await post(['project'], {});
  await post(['body'], undefined);
  await api.refused(400, ['limit', '"x"'], 'GET', '/projects?limit=x');
  await api.refused(400, ['limit', '401'], 'GET', '/projects?limit=401');
  await api.refused(400, ['cursor', '"zzz"'], 'GET', '/projects?cursor=zzz');
  await api.refused(400, ['too large'], 'POST', '/projects', { project: { name: 'x'.repeat(2 ** 20) } });
  await api.refused(404, ['GET /api/v2/nothing'], 'GET', '/nothing');
});

test('a body that is not JSON is refused without quoting it', async () => {
  await using api = new Api();
  const headers = { authorization: `Bearer ${api.key}`, 'content-type': 'application/json' };
  const response = await api.server.inject({ method: 'POST', url: '/api/v2/projects', headers, payload: '{"secret' });
  assert.equal(response.statusCode, 400);
  assert(!response.body.includes('secret'));
});

test('a request without a body may have any content type, one with a body is JSON', async () => {
  await using api = new Api();
  const form = { 'content-type': 'application/x-www-form-urlencoded' };
  const created = await api.ok(201, 'POST', '/projects', { project: {} });
  const project = `/projects/${String(at(created, 'project', 'id'))}`;
  const branch = `${project}/branches/${String(at(created, 'branch', 'id'))}`;
  await api.ok(200, 'POST', `${branch}/set_as_default`, undefined, form);
  await api.ok(201, 'POST', `${project}/branches`, undefined, { 'content-type': 'application/json; charset=utf-8' });
  await api.refused(400, ['x-www-form-urlencoded'], 'POST', '/projects', { project: {} }, form);
});

test('the request’s id comes back in errors', async () => {
  await using api = new Api();
  const given = await api.refused(404, [], 'GET', '/projects/none', undefined, { 'x-request-id': 'abc-1' });
  assert.equal(given['request_id'], 'abc-1');
  const odd = await api.refused(404, [], 'GET', '/projects/none', undefined, { 'x-request-id': 'a b"' });
  assert.match(String(odd['request_id']), /^[0-9a-f-]{36}$/);
});

test('an unexpected error is answered 500 in the same form', async () => {
  await using api = new Api();
  api.world.storage.failures.push(new Error('the disk is full'));
  const error = await api.refused(500, ['disk is full'], 'POST', '/projects', { project: {} });
  assert.equal(error['code'], 'INTERNAL');
  await api.world.control.operations.idle(); // It also removes what it could not create, which is not to fail here.
  api.world.storage.failures.push(new StrataError('unavailable', 'pageserver away'));
  assert.equal((await api.refused(503, [], 'POST', '/projects', { project: {} }))['code'], 'UNAVAILABLE');
});

test('branches are created with an endpoint, listed, renamed, made default and deleted', async () => {
  await using api = new Api();
  const project = `/projects/${String(at(await api.ok(201, 'POST', '/projects', { project: {} }), 'project', 'id'))}`;
  const created = await api.ok(201, 'POST', `${project}/branches`, {
    branch: { name: 'dev' },
    endpoints: [{ type: 'read_write', suspend_timeout_seconds: 60 }],
    annotation_value: {},
  });
  hasFields(created['branch'], 'branch');
  hasFields(at(created, 'endpoints', 0), 'endpoint');
  assert.equal(at(created, 'endpoints', 0, 'suspend_timeout_seconds'), 60);
  assert.match(String(at(created, 'branch', 'parent_lsn')), /^[0-9A-F]+\/[0-9A-F]+$/);
  assert.match(
    String(at(created, 'connection_uris', 0, 'connection_uri')),
    new RegExp(String(at(created, 'endpoints', 0, 'id'))),
  );
  const branch = `${project}/branches/${String(at(created, 'branch', 'id'))}`;
  const bare = await api.ok(201, 'POST', `${project}/branches`);
  assert.deepEqual(bare['endpoints'], []);
  assert.equal(bare['connection_uris'], undefined);
  assert.equal(at(bare, 'branch', 'name'), at(bare, 'branch', 'id'));

  const list = await api.ok(200, 'GET', `${project}/branches`);
  assert.deepEqual(list['annotations'], {});
  assert.equal(at(list, 'pagination', 'next'), undefined);
  assert.equal((list['branches'] as Json[]).length, 3);
  assert.equal(at(await api.ok(200, 'GET', `${project}/branches/count`), 'count'), 3);
  const shown = await api.ok(200, 'GET', branch);
  assert.equal(at(shown, 'branch', 'logical_size'), 7_654_321);
  assert.equal(
    at(await api.ok(200, 'GET', `${branch}/endpoints`), 'endpoints', 0, 'branch_id'),
    at(created, 'branch', 'id'),
  );

  await api.refused(409, ['"dev"'], 'POST', `${project}/branches`, { branch: { name: 'dev' } });
  await api.refused(409, ['"dev"'], 'PATCH', `${project}/branches/${String(at(bare, 'branch', 'id'))}`, {
    branch: { name: 'dev' },
  });
  assert.equal(
    at(await api.ok(200, 'PATCH', branch, { branch: { name: 'test', expires_at: null } }), 'branch', 'name'),
    'test',
  );
  await api.refused(501, ['expires_at'], 'PATCH', branch, { branch: { expires_at: '2027-01-01T00:00:00Z' } });
  await api.refused(501, ['schema-only'], 'POST', `${project}/branches`, { branch: { init_source: 'schema-only' } });
  await api.refused(501, ['read-only'], 'POST', `${project}/branches`, { endpoints: [{ type: 'read_only' }] });
  await api.refused(404, ['br-none'], 'POST', `${project}/branches`, { branch: { parent_id: 'br-none' } });
  await api.refused(400, ['F/0', 'newest'], 'POST', `${project}/branches`, { branch: { parent_lsn: 'F/0' } });

  assert.equal(at(await api.ok(200, 'POST', `${branch}/set_as_default`), 'branch', 'default'), true);
  await api.refused(409, ['default'], 'DELETE', branch);
  const gone = await api.ok(200, 'DELETE', `${project}/branches/${String(at(bare, 'branch', 'id'))}`);
  assert.equal(at(gone, 'operations', 0, 'action'), 'delete_timeline');
});

test('lists go on from a cursor until every item was seen once', async () => {
  await using api = new Api();
  for (let index = 0; index < 7; index++) {
    api.world.nowMs += index % 2; // Some with the same time.
    await api.ok(201, 'POST', '/projects', { project: { name: `p${index}` } });
  }
  const projects: string[] = [];
  for (let cursor = ''; ;) {
    const page = await api.ok(200, 'GET', `/projects?limit=3${cursor}`);
    const items = page['projects'] as Json[];
    projects.push(...items.map((item) => String(item['name'])));
    if (items.length < 3) break;
    cursor = `&cursor=${String(at(page, 'pagination', 'cursor'))}`;
  }
  assert.deepEqual(projects.toSorted(), ['p0', 'p1', 'p2', 'p3', 'p4', 'p5', 'p6']);
  assert.equal(((await api.ok(200, 'GET', '/projects?search=P3'))['projects'] as Json[]).length, 1);
  assert.equal(((await api.ok(200, 'GET', '/projects?search=%25'))['projects'] as Json[]).length, 0);

  const project = `/projects/${String(at(await api.ok(200, 'GET', '/projects?limit=1'), 'projects', 0, 'id'))}`;
  for (let index = 0; index < 6; index++)
    await api.ok(201, 'POST', `${project}/branches`, { branch: { name: `b${index}` } });
  for (const order of ['sort_by=name&sort_order=asc', 'sort_by=name', '', 'sort_by=created_at']) {
    const names: string[] = [];
    for (let cursor: string | undefined = ''; cursor !== undefined;) {
      const page: Json = await api.ok(200, 'GET', `${project}/branches?limit=2&${order}${cursor}`);
      names.push(...(page['branches'] as Json[]).map((item) => String(item['name'])));
      const next = at(page, 'pagination', 'next') as string | undefined;
      cursor = next === undefined ? undefined : `&cursor=${next}`;
    }
    assert.equal(names.length, 7, order);
    assert.deepEqual(names.toSorted(), ['b0', 'b1', 'b2', 'b3', 'b4', 'b5', 'main'], order);
    if (order === 'sort_by=name') assert.deepEqual(names, names.toSorted().toReversed());
  }
  await api.world.control.operations.idle();
  const page = await api.ok(200, 'GET', `${project}/operations?limit=3`);
  const rest = await api.ok(200, 'GET', `${project}/operations?cursor=${String(at(page, 'pagination', 'cursor'))}`);
  assert.equal((page['operations'] as Json[]).length + (rest['operations'] as Json[]).length, 8);
});

test('endpoints are started, suspended, restarted, changed and deleted, with operations to follow', async () => {
  await using api = new Api();
  const created = await api.ok(201, 'POST', '/projects', { project: {} });
  const project = `/projects/${String(at(created, 'project', 'id'))}`;
  const endpoint = `${project}/endpoints/${String(at(created, 'endpoints', 0, 'id'))}`;
  const finished = async (body: Json) => {
    await api.world.control.operations.idle();
    for (const operation of body['operations'] as Json[]) {
      const shown = await api.ok(200, 'GET', `${project}/operations/${String(operation['id'])}`);
      assert.equal(at(shown, 'operation', 'status'), 'finished');
    }
    return at(await api.ok(200, 'GET', endpoint), 'endpoint', 'current_state');
  };
  assert.equal(await finished(created), 'active');
  const suspended = await api.ok(200, 'POST', `${endpoint}/suspend`);
  assert.deepEqual(
    [at(suspended, 'endpoint', 'current_state'), at(suspended, 'endpoint', 'pending_state')],
    ['active', 'idle'],
  );
  assert.equal(await finished(suspended), 'idle');
  assert.deepEqual((await api.ok(200, 'POST', `${endpoint}/suspend`))['operations'], []);
  const started = await api.ok(200, 'POST', `${endpoint}/start`, {});
  assert.equal(at(started, 'operations', 0, 'action'), 'start_compute');
  assert.equal(await finished(started), 'active');
  assert.deepEqual((await api.ok(200, 'POST', `${endpoint}/start`))['operations'], []);
  const restarted = await api.ok(200, 'POST', `${endpoint}/restart`);
  assert.equal((restarted['operations'] as Json[]).length, 2);
  assert.equal(await finished(restarted), 'active');

  const changed = await api.ok(200, 'PATCH', endpoint, {
    endpoint: { suspend_timeout_seconds: -1, name: 'main compute' },
  });
  assert.equal(at(changed, 'endpoint', 'suspend_timeout_seconds'), -1);
  await api.refused(400, ['suspend_timeout_seconds', '-2'], 'PATCH', endpoint, {
    endpoint: { suspend_timeout_seconds: -2 },
  });
  await api.refused(501, ['work_mem'], 'PATCH', endpoint, {
    endpoint: { settings: { pg_settings: { work_mem: '1GB' } } },
  });
  const branchId = at(created, 'branch', 'id');
  await api.refused(409, ['read-write'], 'POST', `${project}/endpoints`, {
    endpoint: { branch_id: branchId, type: 'read_write' },
  });
  await api.ok(200, 'DELETE', endpoint);
  await api.refused(404, [], 'GET', endpoint);
  await api.world.control.operations.idle();
  await api.ok(201, 'POST', `${project}/endpoints`, { endpoint: { branch_id: branchId, type: 'read_write' } });
  assert.equal(((await api.ok(200, 'GET', `${project}/endpoints`))['endpoints'] as Json[]).length, 1);
});

test('roles and databases are shown, passwords only where asked', async () => {
  await using api = new Api();
  const created = await api.ok(201, 'POST', '/projects', { project: {} });
  const project = `/projects/${String(at(created, 'project', 'id'))}`;
  const branch = `${project}/branches/${String(at(created, 'branch', 'id'))}`;
  const password = at(created, 'roles', 0, 'password');
  const role = at(await api.ok(200, 'GET', `${branch}/roles`), 'roles', 0);
  hasFields(role, 'role');
  assert.equal(at(role, 'password'), undefined);
  assert.equal(at(await api.ok(200, 'GET', `${branch}/roles/stratadb_owner`), 'role', 'password'), undefined);
  assert.equal(at(await api.ok(200, 'GET', `${branch}/roles/stratadb_owner/reveal_password`), 'password'), password);
  const reset = await api.ok(200, 'POST', `${branch}/roles/stratadb_owner/reset_password`);
  assert.notEqual(at(reset, 'role', 'password'), password);
  assert.equal(at(reset, 'operations', 0, 'action'), 'apply_config');
  await api.refused(404, ['"bob"', 'stratadb_owner'], 'GET', `${branch}/roles/bob`);
  hasFields(at(await api.ok(200, 'GET', `${branch}/databases`), 'databases', 0), 'database');
  hasFields(at(await api.ok(200, 'GET', `${branch}/databases/stratadb`), 'database'), 'database');
  await api.refused(404, ['"nope"', 'stratadb'], 'GET', `${branch}/databases/nope`);

  const uri = `${project}/connection_uri?database_name=stratadb&role_name=stratadb_owner`;
  const shown = String(at(await api.ok(200, 'GET', uri), 'uri'));
  assert(shown.includes(String(at(reset, 'role', 'password'))));
  await api.refused(400, ['role_name'], 'GET', `${project}/connection_uri?database_name=stratadb`);
  await api.refused(
    404,
    ['has no endpoint'],
    'GET',
    `${uri}&branch_id=${String(at(await api.ok(201, 'POST', `${project}/branches`), 'branch', 'id'))}`,
  );
});

test('the user, the key and the region are known', async () => {
  await using api = new Api();
  assert.equal(at(await api.ok(200, 'GET', '/users/me'), 'login'), 'strata');
  assert.deepEqual((await api.ok(200, 'GET', '/users/me/organizations'))['organizations'], []);
  assert.equal(at(await api.ok(200, 'GET', '/auth'), 'auth_method'), 'api_key_user');
  assert.equal(at(await api.ok(200, 'GET', '/regions'), 'regions', 0, 'default'), true);
});
