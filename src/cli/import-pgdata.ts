/** `strata import --pgdata`: the platform reads the directory; this begins it, follows it and tells what came of it. */
import { resolve } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { type CliContext, openPlatform, show } from './context.ts';
import { listProjects, type Project } from './entities.ts';
import { CliError } from './errors.ts';
import { formatFields } from './format.ts';
import type { ImportOptions } from './import.ts';
import { byteProgressPrinter } from './progress.ts';

interface DataImport {
  readonly id: string;
  readonly project_id: string;
  readonly state: 'importing' | 'starting' | 'finished' | 'failed';
  readonly error?: string;
  readonly done_bytes?: number;
  readonly total_bytes?: number;
  readonly notes: readonly string[];
}

interface ImportAnswer {
  readonly import: DataImport;
  readonly connection_uris?: readonly { readonly connection_uri: string }[];
}

const POLL_MS = 200;

export async function importDataDirectory(
  context: CliContext,
  options: ImportOptions & { readonly pgdata: string },
): Promise<void> {
  const { api } = openPlatform(context, options);
  const startedMs = context.now();
  const begun = await api.post<ImportAnswer & { project: Project }>('/projects/import', {
    import: {
      data_directory: resolve(options.pgdata),
      name: options.name,
      role_name: options.role,
      keep: options.keep,
    },
  });
  const { project } = begun;
  const print = byteProgressPrinter(context);
  let isInterrupted = false;
  const cancel = (): void => {
    isInterrupted = true;
    context.printError('ending the import');
    api.delete(`/imports/${begun.import.id}`).catch((error: unknown) => {
      context.printError(`it cannot be ended any more: ${error instanceof Error ? error.message : String(error)}`);
    });
  };
  process.once('SIGINT', cancel);
  process.once('SIGTERM', cancel);
  let answer: ImportAnswer = begun;
  while (answer.import.state === 'importing' || answer.import.state === 'starting') {
    await sleep(POLL_MS);
    const before = answer.import.state;
    answer = await api.get<ImportAnswer>(`/imports/${begun.import.id}`);
    const { state, done_bytes: doneBytes, total_bytes: totalBytes } = answer.import;
    if (doneBytes !== undefined && totalBytes !== undefined) print({ doneBytes, totalBytes });
    if (state === 'starting' && before === 'importing') context.printError('pages are read; starting it');
  }
  const { state, error, notes } = answer.import;
  process.off('SIGINT', cancel);
  process.off('SIGTERM', cancel);
  if (state === 'failed') {
    const isLeft = options.keep && (await listProjects(api)).some(({ id }) => id === project.id);
    const left = isLeft ? `project ${project.id} is left as it is` : 'nothing is left of the new project';
    throw new CliError(`${isInterrupted ? 'interrupted' : (error ?? 'the import failed')}; ${left}`);
  }
  const uri = answer.connection_uris?.[0]?.connection_uri;
  const value = {
    project_id: project.id,
    name: project.name,
    pg_version: project.pg_version,
    connection_uri: uri,
    notes,
    duration_ms: context.now() - startedMs,
  };
  show(context, options, value, () =>
    [
      formatFields([
        ['project', project.name],
        ['id', project.id],
        ['Postgres', String(project.pg_version)],
        ['connection', uri ?? '-'],
      ]),
      ...(notes.length === 0 ? [] : ['', 'Not as it was:', ...notes.map((note) => `- ${note}`)]),
    ].join('\n'),
  );
}
