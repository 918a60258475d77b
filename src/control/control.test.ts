import assert from 'node:assert/strict';
import { readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { StrataError } from '../base/errors.ts';
import { formatLsn } from '../postgres/lsn.ts';
import { branchChanges } from './branch-changes.ts';
import type { BranchCreateOptions } from './branches.ts';
import { formatTimestampUs } from './timestamps.ts';
import { TEMPLATE_LSN, World, quietSample } from './fake-world.ts';
import type { CreatedProject } from './projects.ts';
import type { BranchRow } from './state.ts';

const never = new AbortController().signal;

async function newBranch(world: World, created: CreatedProject, options: BranchCreateOptions = {}) {
  const { branch, endpoints } = await world.control.branches.create(created.project, options, [{ type: 'read_write' }]);
  return { branch, endpoint: endpoints[0]! };
}

function fails(code: string, ...words: string[]) {
  return (error: unknown) => {
    assert(error instanceof StrataError, String(error));
    assert.equal(error.code, code, error.message);
    for (const word of words) assert(error.message.includes(word), `"${error.message}" says ${word}`);
    return true;
  };
}

test('a new project is a branch of the template, with a role, a database and a compute that starts at once', async () => {
  await using world = new World();
  const created = await world.control.projects.create({ name: 'shop' });
  assert.equal(created.branch.name, 'main');
  assert.equal(created.branch.state, 'ready');
  const timeline = world.storage.timelines.get(created.branch.timeline_id)!;
  assert.equal(timeline.tenantId, created.project.tenant_id);
  assert.deepEqual(timeline.ancestor, await world.storage.ensureTemplate(17));

  const running = await world.control.wake(
    { endpointId: undefined, user: 'stratadb_owner', database: 'stratadb' },
    never,
  );
  assert.equal(running.endpointId, created.endpoint.id);
  const catalog = world.computes.catalogs.get(created.endpoint.id)!;
  assert.deepEqual(catalog.databases, [{ name: 'stratadb', ownerName: 'stratadb_owner' }]);
  assert.match(catalog.roles[0]!.scramVerifier, /^SCRAM-SHA-256\$4096:[^$]+\$[^:]+:.+$/);
  assert.deepEqual(world.computes.calls, [`start ${created.endpoint.id}`]);
});

test('a version without binaries is refused by name', async () => {
  await using world = new World();
  await assert.rejects(world.control.projects.create({ pg_version: 16 }), fails('bad-request', '16', 'available: 17'));
  assert.equal(world.control.projects.count(), 0);
});

test('no file of the state holds a password, and all are private', async () => {
  await using world = new World();
  const { branch } = await world.control.projects.create({});
  const password = world.control.catalog.password(world.control.catalog.role(branch.id, 'stratadb_owner'));
  const key = readFileSync(join(world.dataDirectory, 'api-key'), 'utf8').trim();
  assert.equal(password.length, 16);
  for (const name of readdirSync(world.dataDirectory)) {
    const path = join(world.dataDirectory, name);
    assert.equal(statSync(path).mode & 0o777, 0o600, name);
    const bytes = readFileSync(path);
    assert(!bytes.includes(password), name);
    assert(name === 'api-key' || !bytes.includes(key), name);
  }
});

test('a branch from the head takes the parent’s roles and passwords, and its cluster needs nothing applied', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const head = world.storage.commit(created.branch.timeline_id, world.nowMs * 1000);
  const { branch, endpoint } = await newBranch(world, created, { name: 'dev' });
  assert.equal(branch.ancestor_lsn, head);
  assert.equal(branch.parent_id, created.branch.id);
  const password = (row: BranchRow) =>
    world.control.catalog.password(world.control.catalog.role(row.id, 'stratadb_owner'));
  assert.equal(password(branch), password(created.branch));

  assert.equal(endpoint.state, 'idle');
  await world.control.wake({ endpointId: endpoint.id, user: 'u', database: 'd' }, never);
  assert.equal(world.computes.specs.get(endpoint.id)!.timelineId, branch.timeline_id);
  assert.equal(world.computes.specs.get(endpoint.id)!.catalog, undefined);
});

test('a branch made before the parent’s catalog was applied applies it itself', async () => {
  await using world = new World();
  world.computes.startFailures.push(new StrataError('unavailable', 'no room'));
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const { endpoint } = await newBranch(world, created);
  await world.control.endpoints.wake(endpoint.id);
  assert.equal(world.computes.specs.get(endpoint.id)!.catalog?.roles.length, 1);
});

test('a branch at an LSN begins at the record boundary, and its cluster gets the catalog of today', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const before = world.storage.commit(created.branch.timeline_id, world.nowMs * 1000);
  world.storage.commit(created.branch.timeline_id, world.nowMs * 1000);
  const { branch, endpoint } = await newBranch(world, created, { parent_lsn: formatLsn(before + 3) });
  assert.equal(branch.ancestor_lsn, before);
  await world.control.endpoints.wake(endpoint.id);
  assert.notEqual(world.computes.specs.get(endpoint.id)!.catalog, undefined);
});

test('a branch at a time holds the commits at or before it', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const startUs = world.nowMs * 1000;
  const lsns = [100_000, 200_000, 300_001].map((us) => world.storage.commit(created.branch.timeline_id, startUs + us));
  world.nowMs += 5000;
  const at = async (parent_timestamp: string) => (await newBranch(world, created, { parent_timestamp })).branch;
  assert.equal((await at('2026-01-31T12:00:00.200Z')).ancestor_lsn, lsns[1]);
  assert.equal((await at('2026-01-31T12:00:00.300000Z')).ancestor_lsn, lsns[1]);
  assert.equal((await at('2026-01-31T13:00:00.300001+01:00')).ancestor_lsn, lsns[2]);
  assert.equal((await at('2026-01-31T12:00:00Z')).ancestor_lsn, TEMPLATE_LSN);
});

test('a point before a branch began is one of its parent’s history, over generations, and back again', async () => {
  await using world = new World();
  const created = await world.control.projects.create({ branch: { name: 'trunk' } });
  const us = () => world.nowMs * 1000;
  const first = world.storage.commit(created.branch.timeline_id, us());
  const firstUs = us();
  world.nowMs += 1000;
  world.storage.commit(created.branch.timeline_id, us());
  const { branch: dev } = await newBranch(world, created, { name: 'dev' });
  world.nowMs += 1000;
  const second = world.storage.commit(dev.timeline_id, us());
  const secondUs = us();
  world.nowMs += 1000;
  world.storage.commit(dev.timeline_id, us());
  const { branch: leaf } = await newBranch(world, created, { name: 'leaf', parent_id: dev.id });
  world.nowMs += 1000;
  world.storage.commit(leaf.timeline_id, us());
  const { points } = world.control.branches;
  const find = async (timestampUs: number) => points.find(leaf, { timestamp: formatTimestampUs(timestampUs) });
  const inTrunk = await find(firstUs + 500);
  assert.deepEqual([inTrunk.branch.name, inTrunk.lsn], ['trunk', first]);
  assert.equal(await points.timestampUs(inTrunk), firstUs);
  const inDev = await find(secondUs + 500);
  assert.deepEqual([inDev.branch.name, inDev.lsn], ['dev', second]);
  const byLsn = await points.find(leaf, { lsn: formatLsn(first) });
  assert.deepEqual([byLsn.branch.name, byLsn.lsn], ['trunk', first]);
  const { branch } = await newBranch(world, created, { parent_id: leaf.id, parent_lsn: formatLsn(first) });
  assert.deepEqual([branch.parent_id, branch.ancestor_lsn], [created.branch.id, first]);
  assert.equal((await points.find(leaf, {})).isHead, true);
  assert.equal(
    await points.timestampUs(await points.find(created.branch, { lsn: formatLsn(TEMPLATE_LSN) })),
    undefined,
  );
});

test('a branch may begin at a position that Postgres has told before its flush', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const head = world.storage.commit(created.branch.timeline_id, world.nowMs * 1000);
  const creation = newBranch(world, created, { parent_lsn: formatLsn(head + 64) });
  await sleep(20);
  assert.equal(world.storage.commit(created.branch.timeline_id, world.nowMs * 1000), head + 64);
  assert.equal((await creation).branch.ancestor_lsn, head + 64);
});

test('what changed between two LSNs is told with the head asked for once, and again for one past it', async () => {
  await using world = new World();
  const { project, branch } = await world.control.projects.create({});
  const { storage, control } = world;
  const [first, last] = [1, 2].map(() => storage.commit(branch.timeline_id, world.nowMs * 1000));
  const askedFor: string[] = [];
  const headLsn = storage.headLsn.bind(storage);
  storage.headLsn = (timelineId) => {
    askedFor.push(timelineId);
    return headLsn(timelineId);
  };
  const between = async (from: number, to: number): Promise<readonly [number, number]> => {
    const window = { from_lsn: formatLsn(from), to_lsn: formatLsn(to) };
    const { fromLsn, toLsn } = await branchChanges(control.context, control.branches, project.id, branch.id, window);
    return [fromLsn, toLsn];
  };
  assert.deepEqual(await between(first!, last!), [first, last]);
  assert.deepEqual(askedFor, [branch.timeline_id]);
  await assert.rejects(between(first!, last! + 2 ** 30), fails('bad-request', 'in the future'));
  assert.equal(askedFor.length, 3);
});

test('points outside of the parent’s history are refused with the range', async () => {
  await using world = new World();
  const created = await world.control.projects.create({ branch: { name: 'trunk' } });
  const head = world.storage.commit(created.branch.timeline_id, world.nowMs * 1000);
  const create = (options: BranchCreateOptions) => world.control.branches.create(created.project, options, []);
  const range = [`oldest ${formatLsn(TEMPLATE_LSN)}`, `newest ${formatLsn(head)}`, 'trunk'];
  await assert.rejects(create({ parent_lsn: 'F/0' }), fails('bad-request', 'F/0', 'future', ...range));
  await assert.rejects(create({ parent_lsn: '0/10' }), fails('bad-request', '0/10', 'before', ...range));
  await assert.rejects(create({ parent_lsn: 'x' }), fails('bad-request', '"x"'));
  await assert.rejects(
    create({ parent_timestamp: '2027-01-01T00:00:00Z' }),
    fails('bad-request', '2027', 'future', '2026-01-31'),
  );
  await assert.rejects(
    create({ parent_timestamp: '2025-01-01T00:00:00Z' }),
    fails('bad-request', '2025', 'before', '2026-01-31'),
  );
  await assert.rejects(create({ parent_timestamp: 'yesterday' }), fails('bad-request', '"yesterday"'));
  await assert.rejects(
    create({ parent_lsn: '0/0', parent_timestamp: '2025-01-01T00:00:00Z' }),
    fails('bad-request', 'exclude'),
  );
  assert.equal(world.control.branches.all(created.project.id).length, 1);
});

test('a name is taken once in a project, even when two ask at the same time, and is free again after deletion', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const both = await Promise.allSettled([
    newBranch(world, created, { name: 'dev' }),
    newBranch(world, created, { name: 'dev' }),
  ]);
  const made = both.filter((result) => result.status === 'fulfilled');
  const refused = both.filter((result) => result.status === 'rejected');
  assert.equal(made.length, 1);
  assert(fails('conflict', '"dev"', made[0]!.value.branch.id)(refused[0]!.reason));
  world.control.branches.delete(created.project.id, made[0]!.value.branch.id);
  await newBranch(world, created, { name: 'dev' });
});

test('the default branch, a protected branch and a parent are not deleted', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const { branch: parent } = await newBranch(world, created, { name: 'parent' });
  const { branch: child } = await newBranch(world, created, { name: 'child', parent_id: parent.id, protected: true });
  const remove = (branch: BranchRow) => world.control.branches.delete(created.project.id, branch.id);
  assert.throws(() => remove(created.branch), fails('conflict', 'main', 'default'));
  assert.throws(() => remove(parent), fails('conflict', 'child'));
  assert.throws(() => remove(child), fails('conflict', 'protected'));
  world.control.branches.update(created.project.id, child.id, { protected: false });
  remove(child);
  remove(parent);
  await world.control.operations.idle();
  assert(!world.storage.timelines.has(parent.timeline_id));
  assert(!world.storage.timelines.has(child.timeline_id));
});

test('deleting a branch stops its compute, forgets its files and leaves no row', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const { branch, endpoint } = await newBranch(world, created);
  await world.control.endpoints.wake(endpoint.id);
  world.control.branches.delete(created.project.id, branch.id);
  await assert.rejects(world.control.endpoints.wake(endpoint.id), fails('not-found', endpoint.id));
  await world.control.operations.idle();
  assert(world.computes.calls.includes(`kill ${endpoint.id} and forget`));
  for (const table of ['branches', 'endpoints', 'roles', 'databases']) {
    const column = table === 'branches' ? 'id' : 'branch_id';
    assert.deepEqual(
      world.control.context.state.all(`SELECT * FROM ${table} WHERE ${column} = ?`, branch.id),
      [],
      table,
    );
  }
});

test('deleting a project removes its branches, children first, and everything it had', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  let parent = created.branch;
  for (let depth = 0; depth < 5; depth++) parent = (await newBranch(world, created, { parent_id: parent.id })).branch;
  world.control.projects.delete(created.project.id);
  assert.throws(() => world.control.projects.get(created.project.id), fails('not-found', created.project.id));
  await world.control.operations.idle();
  assert.equal(world.storage.timelines.size, 1, 'only the template is left');
  for (const table of ['projects', 'branches', 'endpoints', 'roles', 'databases', 'operations']) {
    assert.deepEqual(world.control.context.state.all(`SELECT * FROM ${table}`), [], table);
  }
});

test('when storage refuses a branch, nothing of it stays', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  world.storage.failures.push(new StrataError('internal', 'disk full'));
  await assert.rejects(newBranch(world, created, { name: 'dev' }), fails('internal', 'disk full'));
  await world.control.operations.idle();
  assert.equal(world.control.branches.all(created.project.id).length, 1);
  assert.equal(world.control.endpoints.list(created.project.id).length, 1);
  await newBranch(world, created, { name: 'dev' });
});

test('when storage refuses a project, nothing of it stays', async () => {
  await using world = new World();
  world.storage.failures.push(new StrataError('unavailable', 'pageserver away'));
  await assert.rejects(world.control.projects.create({}), fails('unavailable', 'pageserver away'));
  await world.control.operations.idle();
  assert.deepEqual(world.control.context.state.all('SELECT * FROM projects'), []);
});

test('a deletion is tried again while storage is away', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const { branch } = await newBranch(world, created);
  world.storage.failures.push(new StrataError('unavailable', 'away'), new StrataError('unavailable', 'away'));
  const { operationIds } = world.control.branches.delete(created.project.id, branch.id);
  await world.control.operations.idle();
  assert(!world.storage.timelines.has(branch.timeline_id));
  const operation = world.control.operations.get(created.project.id, operationIds[0]!);
  assert.deepEqual([operation.status, operation.failures_count], ['finished', 2]);
});

test('a platform that died while creating a branch finishes it at the next start', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const lost = new Promise<never>(() => {});
  world.storage.createTimeline = () => lost;
  void world.control.branches.create(created.project, { name: 'dev' }, [{ type: 'read_write' }]);
  await new Promise((resolve) => setImmediate(resolve));
  world.control.context.state.close();

  Reflect.deleteProperty(world.storage, 'createTimeline');
  await world.restart();
  const branch = world.control.branches.all(created.project.id).find((each) => each.name === 'dev')!;
  assert.equal(branch.state, 'ready');
  assert(world.storage.timelines.has(branch.timeline_id));
  assert.deepEqual(world.control.operations.unfinished(), []);
});

test('a platform that died while deleting and while starting goes on with the one and gives up the other', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const { branch } = await newBranch(world, created);
  const other = await newBranch(world, created);
  const lost = new Promise<never>(() => {});
  world.storage.deleteTimeline = () => lost;
  world.computes.start = () => lost;
  world.control.branches.delete(created.project.id, branch.id);
  const start = world.control.endpoints.start(created.project.id, other.endpoint.id);
  await new Promise((resolve) => setTimeout(resolve, 20));
  world.control.context.state.close();

  Reflect.deleteProperty(world.storage, 'deleteTimeline');
  Reflect.deleteProperty(world.computes, 'start');
  await world.restart();
  await world.control.operations.idle();
  assert(!world.storage.timelines.has(branch.timeline_id));
  const operation = world.control.operations.get(created.project.id, start.operationIds[0]!);
  assert.equal(operation.status, 'failed');
  assert.match(operation.error!, /platform stopped/);
  for (const endpoint of world.control.endpoints.list(created.project.id)) {
    assert.deepEqual([endpoint.state, endpoint.pending_state], ['idle', null]);
  }
  await world.control.endpoints.wake(other.endpoint.id);
});

test('many clients that wake one endpoint share one start', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const { endpoint } = await newBranch(world, created);
  world.computes.calls.length = 0;
  await Promise.all(Array.from({ length: 50 }, () => world.control.endpoints.wake(endpoint.id)));
  assert.deepEqual(
    world.computes.calls.filter((call) => call.endsWith(endpoint.id)),
    [`start ${endpoint.id}`],
  );
});

test('a wake that meets a suspend starts the compute again after it', async () => {
  await using world = new World();
  const { project, endpoint } = await world.control.projects.create({});
  await world.control.endpoints.wake(endpoint.id);
  world.control.endpoints.suspend(project.id, endpoint.id);
  const running = await world.control.endpoints.wake(endpoint.id);
  assert.equal(running.endpointId, endpoint.id);
  assert.deepEqual(
    world.computes.calls,
    ['start', 'suspend', 'start'].map((call) => `${call} ${endpoint.id}`),
  );
  assert.equal(world.control.endpoints.get(project.id, endpoint.id).state, 'active');
});

test('a client that goes away while it waits does not end the start for others', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  const { endpoint } = await newBranch(world, created);
  const impatient = new AbortController();
  const first = world.control.endpoints.wake(endpoint.id, impatient.signal);
  const second = world.control.endpoints.wake(endpoint.id);
  impatient.abort(new Error('gone'));
  await assert.rejects(first, /gone/);
  assert.equal((await second).endpointId, endpoint.id);
});

test('a start that failed is tried again by the next client', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const { endpoint } = await newBranch(world, created);
  world.computes.startFailures.push(new StrataError('unavailable', 'no safekeepers'));
  await assert.rejects(world.control.endpoints.wake(endpoint.id), fails('unavailable', 'no safekeepers'));
  await world.control.endpoints.wake(endpoint.id);
});

test('a compute that stops by itself is shown as idle and started by the next client', async () => {
  await using world = new World();
  const { project, endpoint } = await world.control.projects.create({});
  await world.control.operations.idle();
  world.computes.crash(endpoint.id);
  assert.equal(world.control.endpoints.get(project.id, endpoint.id).state, 'idle');
  await world.control.endpoints.wake(endpoint.id);
  assert.equal(world.control.endpoints.get(project.id, endpoint.id).state, 'active');
});

test('clients name their endpoint, except where only one can be meant', async () => {
  await using world = new World();
  const request = (endpointId?: string) => ({ endpointId, user: 'u', database: 'd' });
  await assert.rejects(world.control.wake(request(), never), fails('not-found', 'no project'));
  const first = await world.control.projects.create({});
  assert.equal((await world.control.wake(request(), never)).endpointId, first.endpoint.id);
  const second = await world.control.projects.create({});
  await assert.rejects(
    world.control.wake(request(), never),
    fails('not-found', 'several projects', 'options=endpoint%3D'),
  );
  assert.equal(
    (await world.control.wake(request(`${second.endpoint.id}-pooler`), never)).endpointId,
    second.endpoint.id,
  );
  await assert.rejects(world.control.wake(request('ep-no-such-1'), never), fails('not-found', 'ep-no-such-1'));
  world.control.endpoints.update(first.project.id, first.endpoint.id, { disabled: true });
  await world.control.operations.idle();
  await assert.rejects(world.control.wake(request(first.endpoint.id), never), fails('forbidden', 'disabled'));
});

test('a second read-write endpoint on a branch is refused', async () => {
  await using world = new World();
  const { project, branch, endpoint } = await world.control.projects.create({});
  assert.throws(() => world.control.endpoints.create(project, branch, {}), fails('conflict', endpoint.id));
  world.control.endpoints.delete(project.id, endpoint.id);
  await world.control.operations.idle();
  world.control.endpoints.create(project, branch, {});
});

test('a new password reaches a running compute, and a suspended one at its start', async () => {
  await using world = new World();
  const { project, branch, endpoint } = await world.control.projects.create({});
  await world.control.operations.idle();
  const verifier = () => world.computes.catalogs.get(endpoint.id)!.roles[0]!.scramVerifier;
  const before = verifier();
  const { role } = await world.control.resetPassword(project.id, branch.id, 'stratadb_owner');
  await world.control.operations.idle();
  assert.equal(verifier(), role.scram_verifier);
  assert.notEqual(verifier(), before);

  world.control.endpoints.suspend(project.id, endpoint.id);
  await world.control.operations.idle();
  const again = await world.control.resetPassword(project.id, branch.id, 'stratadb_owner');
  await world.control.operations.idle();
  assert.notEqual(verifier(), again.role.scram_verifier);
  await world.control.endpoints.wake(endpoint.id);
  assert.equal(verifier(), again.role.scram_verifier);
});

test('an endpoint suspends when it was idle for its timeout, and not while it works', async () => {
  await using world = new World();
  const { project, endpoint } = await world.control.projects.create({});
  await world.control.operations.idle();
  const stateAfter = async (seconds: number) => {
    world.nowMs += seconds * 1000;
    await world.control.pollIdle();
    return world.control.endpoints.get(project.id, endpoint.id).state;
  };
  assert.equal(await stateAfter(299), 'active');
  world.computes.samples.set(endpoint.id, { ...quietSample, busyBackendCount: 1 });
  assert.equal(await stateAfter(1000), 'active');
  world.computes.samples.set(endpoint.id, quietSample);
  assert.equal(await stateAfter(299), 'active');
  assert.equal(await stateAfter(1), 'idle');
});

test('an endpoint that never suspends does not', async () => {
  await using world = new World({ suspendTimeoutSeconds: -1 });
  const { project, endpoint } = await world.control.projects.create({});
  await world.control.operations.idle();
  world.nowMs += 1e9;
  await world.control.pollIdle();
  assert.equal(world.control.endpoints.get(project.id, endpoint.id).state, 'active');
});

test('with a thousand branches, one more is quick', async () => {
  await using world = new World();
  const created = await world.control.projects.create({});
  await world.control.operations.idle();
  const { state } = world.control.context;
  const { branch } = await newBranch(world, created);
  state.transaction(() => {
    for (let index = 0; index < 1000; index++) {
      const row = state.get<BranchRow>('SELECT * FROM branches WHERE id = ?', branch.id)!;
      state.insert('branches', { ...row, id: `br-x-y-${index}`, name: `b${index}`, timeline_id: `${index}` });
    }
  });
  const times: number[] = [];
  for (let index = 0; index < 20; index++) {
    const start = performance.now();
    await newBranch(world, created);
    times.push(performance.now() - start);
  }
  times.sort((a, b) => a - b);
  // The budget is 10 ms with the real storage; this leaves room for a busy machine.
  assert(times[10]! < 100, `median ${times[10]!.toFixed(1)} ms`);
});
