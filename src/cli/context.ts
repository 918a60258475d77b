/**
 * What every command is given: the terminal, the environment, the clock; and what every command does: options, output, finding its project.
 */
import { Command, Option } from 'commander';
import { type Project, findProject } from './entities.ts';
import { type RunningPlatform, chooseDataDirectory, findPlatform } from './platform.ts';

export interface CliContext {
  /** One or more whole lines, without the last line's end. */
  readonly print: (text: string) => void;
  readonly printError: (text: string) => void;
  readonly environment: NodeJS.ProcessEnv;
  /** Milliseconds since 1970. */
  readonly now: () => number;
  /** Runs a program on this terminal; resolves to its exit code, or undefined when it is not on PATH. */
  readonly runProgram: (
    name: string,
    programArguments: readonly string[],
    environment: NodeJS.ProcessEnv,
  ) => Promise<number | undefined>;
}

export interface CommonOptions {
  readonly dataDir?: string;
  readonly output: 'table' | 'json';
}

export interface ProjectOptions extends CommonOptions {
  readonly project?: string;
}

export interface ProjectScope extends RunningPlatform {
  readonly project: Project;
}

/** A command that talks to a running platform. */
export function platformCommand(name: string, description: string, example: string): Command {
  return new Command(name)
    .description(description)
    .option('--data-dir <directory>', 'data directory of the platform (default: STRATA_DATA_DIR, else .strata)')
    .addOption(new Option('-o, --output <form>', 'form of the output').choices(['table', 'json']).default('table'))
    .addHelpText('after', `\nExample:\n  $ strata ${example}`);
}

/** A command about one project. */
export function projectCommand(name: string, description: string, example: string): Command {
  const option = '--project <project>';
  return platformCommand(name, description, example).option(
    option,
    'id or name of the project; needed when there are several',
  );
}

export function openPlatform(context: CliContext, options: CommonOptions): RunningPlatform {
  return findPlatform(chooseDataDirectory(options.dataDir, context.environment));
}

export async function openProject(context: CliContext, options: ProjectOptions): Promise<ProjectScope> {
  const platform = openPlatform(context, options);
  return { ...platform, project: await findProject(platform.api, options.project) };
}

/** `value` as JSON, or what `table` makes for people. */
export function show(context: CliContext, options: CommonOptions, value: unknown, table: () => string): void {
  context.print(options.output === 'json' ? JSON.stringify(value, undefined, 2) : table());
}
