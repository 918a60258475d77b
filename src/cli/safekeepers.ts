/** `strata safekeepers [list] | add | remove | replace | cancel | rebuild`: who keeps the WAL. */
import { setTimeout as sleep } from 'node:timers/promises';
import { Command } from 'commander';
import { describeDamage, type RebuildDamage } from '../api/rebuilt-logs.ts';
import { parseLsn } from '../postgres/lsn.ts';
import { type CliContext, type CommonOptions, openPlatform, platformCommand, show } from './context.ts';
import { branchNames, listProjects } from './entities.ts';
import { CliError } from './errors.ts';
import { formatBytes, formatTable } from './format.ts';
import { wholeNumber } from './numbers.ts';
import type { RunningPlatform } from './platform.ts';

interface Safekeepers {
  readonly version: number;
  readonly safekeepers: readonly {
    readonly id: number;
    readonly address: string;
    readonly state: string;
    readonly role: string;
    readonly timeline_count: number;
    readonly behind_count: number;
    readonly behind_bytes: number;
  }[];
  readonly change?: {
    readonly members: readonly number[];
    readonly moved_timelines: number;
    readonly timeline_count: number;
    readonly last_error?: string;
  };
}

interface Rebuild {
  readonly done: boolean;
  readonly logs: readonly {
    readonly timeline_id: string;
    readonly kept_lsn: string;
    readonly last_commit_at: string | null;
    readonly lost_lsn: string | null;
    readonly source: string;
    readonly safekeepers: readonly number[];
    readonly damage: readonly (Omit<RebuildDamage, 'lsn'> & { readonly lsn: string })[];
  }[];
  readonly failed: readonly { readonly timeline_id: string; readonly reason: string }[];
}

type Change =
  | { readonly kind: 'add'; readonly count: number }
  | { readonly kind: 'remove' | 'replace'; readonly ids: readonly number[] };

const POLL_INTERVAL_MS = 200;
/** What the pageserver has is made durable for each branch before. */
const REBUILD_TIMEOUT_MS = 280_000;

export function safekeepersCommand(context: CliContext): Command {
  const list = platformCommand('list', 'list the safekeepers, and how far they are behind', 'safekeepers list').action(
    async (options: CommonOptions) => {
      const { api } = openPlatform(context, options);
      const found = await api.get<Safekeepers>('/safekeepers');
      show(context, options, found, () => tableOf(found));
    },
  );
  const add = platformCommand('add', 'add safekeepers, and wait until they have everything', 'safekeepers add')
    .option('--count <number>', 'how many; an odd number of safekeepers must result', wholeNumber(1, 99), 2)
    .action(async (options: CommonOptions & { readonly count: number }) =>
      change(context, options, { kind: 'add', count: options.count }),
    );
  const remove = platformCommand('remove', 'remove safekeepers and what they kept', 'safekeepers remove 2 3')
    .argument('<id...>', 'ids of safekeepers')
    .action(async (ids: readonly string[], options: CommonOptions) =>
      change(context, options, { kind: 'remove', ids: idsFrom(ids) }),
    );
  const replace = platformCommand(
    'replace',
    'replace safekeepers, dead ones too, by new ones, and wait until those have everything',
    'safekeepers replace 3',
  )
    .argument('<id...>', 'ids of safekeepers')
    .action(async (ids: readonly string[], options: CommonOptions) =>
      change(context, options, { kind: 'replace', ids: idsFrom(ids) }),
    );
  const cancel = platformCommand('cancel', 'give up the change under way', 'safekeepers cancel').action(
    async (options: CommonOptions) => {
      const { api } = openPlatform(context, options);
      const found = await api.delete<Safekeepers>('/safekeepers/change');
      show(context, options, found, () => `the safekeepers are ${idsOf(found)} as before`);
    },
  );
  const rebuild = platformCommand(
    'rebuild',
    'give up safekeepers that will not come back, when a majority is lost with them, and make the logs anew from what is left',
    'safekeepers rebuild 2 3\n  $ strata safekeepers rebuild 2 3 --accept-loss',
  )
    .argument(
      '[id...]',
      'ids of all safekeepers that do not answer; none, when logs are lost with disks and those of the others are damaged',
    )
    .option('--accept-loss', 'do it; without it, it is only said what would be kept and what is lost')
    .action(async (ids: readonly string[], options: CommonOptions & { readonly acceptLoss?: boolean }) =>
      rebuildWithout(context, options, idsFrom(ids), options.acceptLoss ?? false),
    );
  return new Command('safekeepers')
    .description('list, add, remove and replace safekeepers; rebuild what is lost with them')
    .addCommand(list, { isDefault: true })
    .addCommand(add)
    .addCommand(remove)
    .addCommand(replace)
    .addCommand(cancel)
    .addCommand(rebuild)
    .addHelpText('after', '\nExample:\n  $ strata safekeepers replace 3');
}

/** Begins the change and follows it to its end. */
async function change(context: CliContext, options: CommonOptions, wanted: Change): Promise<void> {
  const { api } = openPlatform(context, options);
  const { members } = await api.post<{ members: readonly number[] }>('/safekeepers/change', { change: wanted });
  const found = await ended(context, api, members);
  show(context, options, found, () => tableOf(found));
  const isDone = idsOf(found) === members.join(', ');
  if (!isDone) throw new CliError(`the change was cancelled: the safekeepers are ${idsOf(found)}`);
}

async function rebuildWithout(
  context: CliContext,
  options: CommonOptions,
  ids: readonly number[],
  acceptsLoss: boolean,
): Promise<void> {
  const { api, dataDirectory } = openPlatform(context, options);
  const body = { ids, accept_loss: acceptsLoss };
  const found = await api.post<Rebuild>('/safekeepers/rebuild', body, REBUILD_TIMEOUT_MS);
  const names = await branchNames(api, await listProjects(api));
  const logs = found.logs.map((log) => ({ ...log, branch: names.get(log.timeline_id) ?? null }));
  const failed = found.failed.map((log) => ({ ...log, branch: names.get(log.timeline_id) ?? null }));
  show(context, options, { ...found, logs, failed }, () => {
    const table = formatTable(
      ['BRANCH', 'EVERYTHING KEPT UP TO', 'LAST COMMIT KEPT', 'FROM', 'LOST FOR CERTAIN'],
      logs.map((log) => [
        log.branch ?? log.timeline_id,
        log.kept_lsn,
        log.last_commit_at ?? 'not known',
        log.source === 'another safekeeper' ? log.source : `the ${log.source}`,
        log.lost_lsn === null ? 'nothing' : `up to ${log.lost_lsn}`,
      ]),
    );
    const damaged = logs.flatMap((log) =>
      log.damage.map(
        (each) => `${log.branch ?? log.timeline_id}: ${describeDamage({ ...each, lsn: parseLsn(each.lsn) })}`,
      ),
    );
    const refused = failed.map((log) => `${log.branch ?? log.timeline_id} is not rebuilt: ${log.reason}`);
    const aside = ids.map((id) => `${dataDirectory}/safekeeper-${id}.given-up-*`);
    if (damaged.length > 0) aside.push(`${dataDirectory}/safekeeper-*/*/*.aside-*`);
    return [
      ...(logs.length === 0 ? ['no log is lost'] : [table]),
      ...damaged,
      ...refused,
      `what was acknowledged after these LSNs, on ${ids.length === 0 ? 'what is lost' : 'the safekeepers that are given up'} only, is lost`,
      ...(found.done && aside.length > 0 ? [`what was there is in ${aside.join(', ')}`] : []),
    ].join('\n');
  });
  if (!found.done) throw new CliError('nothing was changed: with --accept-loss it is done');
  if (failed.length > 0) throw new CliError('not everything was rebuilt');
}

/** Says how far it is whenever that has changed, to people who watch. */
async function ended(
  context: CliContext,
  api: RunningPlatform['api'],
  members: readonly number[],
): Promise<Safekeepers> {
  let said = '';
  for (;;) {
    const found = await api.get<Safekeepers>('/safekeepers');
    const { change: underWay } = found;
    if (underWay === undefined) return found;
    const { moved_timelines: moved, timeline_count: count, last_error: lastError } = underWay;
    const progress = count === 0 ? 'starting' : `${moved} of ${count} branches`;
    const text = `changing to ${members.join(', ')}: ${progress}${lastError === undefined ? '' : ` (${lastError})`}`;
    if (text !== said) context.printError(text);
    said = text;
    await sleep(POLL_INTERVAL_MS);
  }
}

function tableOf({ safekeepers, change: underWay }: Safekeepers): string {
  const table = formatTable(
    ['ID', 'ADDRESS', 'STATE', 'ROLE', 'BRANCHES', 'BEHIND'],
    safekeepers.map((each) => [
      String(each.id),
      each.address,
      each.state,
      each.role,
      each.state === 'up' ? String(each.timeline_count) : '?',
      each.state !== 'up'
        ? '?'
        : each.behind_count === 0
          ? 'nothing'
          : `${formatBytes(each.behind_bytes)} of ${each.behind_count} branches`,
    ]),
  );
  if (underWay === undefined) return table;
  const { members, moved_timelines: moved, timeline_count: count, last_error: lastError } = underWay;
  const state = `changing to ${members.join(', ')}: ${moved} of ${count} branches are there`;
  return `${table}\n${state}${lastError === undefined ? '' : `; it does not go on: ${lastError}`}`;
}

function idsOf({ safekeepers }: Safekeepers): string {
  return safekeepers.map(({ id }) => id).join(', ');
}

function idsFrom(texts: readonly string[]): number[] {
  const twice = texts.find((text, index) => texts.indexOf(text) < index);
  if (twice !== undefined) throw new CliError(`safekeeper ${twice} is named twice`, 2);
  return texts.map((text) => {
    if (/^[1-9]\d{0,8}$/.test(text)) return Number(text);
    throw new CliError(`"${text}" is not the id of a safekeeper: "strata safekeepers" lists them`, 2);
  });
}
