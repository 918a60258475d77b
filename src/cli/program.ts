/**
 * The command line: `strata start` runs the platform, every other command talks to a running one over its API.
 *
 * Results go to standard output, errors to standard error. Exit codes: 0 done, 1 could not be done, 2 the command line is wrong; `psql` gives psql's own.
 */
import { spawn } from 'node:child_process';
import { Command, CommanderError, Help } from 'commander';
import { branchesCommand } from './branches.ts';
import { connectionStringCommand, psqlCommand } from './connect.ts';
import type { CliContext } from './context.ts';
import { endpointsCommand } from './endpoints.ts';
import { CliError } from './errors.ts';
import { exportCommand, type ExportTool } from './export.ts';
import { importCommand } from './import.ts';
import { projectsCommand } from './projects.ts';
import { safekeepersCommand } from './safekeepers.ts';
import { scrubCommand, type ScrubTool } from './scrub.ts';
import { type StartOptions, startCommand } from './start.ts';
import { statusCommand, type WalLagTool } from './status.ts';
import { storageCommand } from './storage.ts';
import { walCommand, type WalTools } from './wal.ts';

export interface CliOptions {
  readonly version: string;
  /** Runs the platform until it is asked to stop. An error with a `code` of its own is shown by its message. */
  readonly start: (options: StartOptions) => Promise<void>;
  /** Without them there is no command `wal`. */
  readonly wal?: WalTools;
  /** Without it `status` says nothing of WAL. */
  readonly walLags?: WalLagTool;
  /** Without it there is no command `export`. */
  readonly export?: ExportTool;
  /** Without it there is no command `scrub`. */
  readonly scrub?: ScrubTool;
  /** The terminal by default. */
  readonly context?: CliContext;
}

/** Runs one command; `commandLine` is without the executable's name. Resolves to the exit code. */
export async function runCli(commandLine: readonly string[], options: CliOptions): Promise<number> {
  const context = options.context ?? terminal();
  // What stands after `--` is for psql, and commander would take it for operands of ours.
  const separator = commandLine.indexOf('--');
  const ours = separator < 0 ? commandLine : commandLine.slice(0, separator);
  const passedOn = separator < 0 ? [] : commandLine.slice(separator + 1);
  let exitCode = 0;
  const psql = psqlCommand(context, passedOn, (code) => (exitCode = code));
  const program = new Command('strata')
    .description('serverless Postgres that anyone can run')
    .version(options.version)
    .addCommand(startCommand(context.environment, options.start))
    .addCommand(statusCommand(context, options.walLags))
    .addCommand(projectsCommand(context))
    .addCommand(branchesCommand(context))
    .addCommand(endpointsCommand(context))
    .addCommand(safekeepersCommand(context))
    .addCommand(storageCommand(context))
    .addCommand(importCommand(context))
    .addCommand(connectionStringCommand(context))
    .addCommand(psql);
  if (options.wal !== undefined) program.addCommand(walCommand(context, options.wal, (code) => (exitCode = code)));
  if (options.export !== undefined) program.addCommand(exportCommand(context, options.export));
  if (options.scrub !== undefined) {
    program.addCommand(scrubCommand(context, options.scrub, (code) => (exitCode = code)));
  }
  program.addHelpText('after', '\nExample:\n  $ strata branches create --name dev\n  $ strata psql dev');
  prepare(program, context);
  try {
    if (passedOn.length > 0 && ours[0] !== 'psql') {
      throw new CliError(`only psql takes arguments after "--", not ${JSON.stringify(ours[0] ?? 'strata')}`, 2);
    }
    await program.parseAsync([...ours], { from: 'user' });
    return exitCode;
  } catch (error) {
    return report(error, context);
  }
}

/** Settings that commander does not hand down to commands that were built elsewhere. */
function prepare(command: Command, context: CliContext): void {
  command
    .exitOverride()
    .configureHelp({
      // Commander tells of a flag that it is off.
      optionDescription: (option) => new Help().optionDescription(option).replace(/ ?\(default: false\)$/, ''),
    })
    .configureOutput({
      writeOut: (text) => context.print(text.replace(/\n$/, '')),
      writeErr: (text) => context.printError(text.replace(/\n$/, '')),
    })
    .showSuggestionAfterError()
    .showHelpAfterError(`(see "${fullName(command)} --help")`);
  for (const child of command.commands) prepare(child, context);
}

function fullName(command: Command): string {
  return command.parent === null ? command.name() : `${fullName(command.parent)} ${command.name()}`;
}

function report(error: unknown, context: CliContext): number {
  // Commander has printed its own errors; help and version are no errors.
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : 2;
  context.printError(`strata: ${error instanceof Error ? error.message : String(error)}`);
  if (error instanceof CliError) return error.exitCode;
  const isOfTheWorld = error instanceof Error && 'code' in error;
  if (!isOfTheWorld && error instanceof Error && error.stack !== undefined) context.printError(error.stack);
  return 1;
}

function terminal(): CliContext {
  // Whoever reads our output may stop reading, as head does.
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    if (error.code !== 'EPIPE') throw error;
    process.exit(0);
  });
  return {
    print: (text) => process.stdout.write(`${text}\n`),
    printError: (text) => process.stderr.write(`${text}\n`),
    environment: process.env,
    now: Date.now,
    runProgram,
  };
}

function runProgram(
  name: string,
  programArguments: readonly string[],
  environment: NodeJS.ProcessEnv,
): Promise<number | undefined> {
  return new Promise((resolve, reject) => {
    // Ctrl-C is for the program on the terminal: psql cancels its query by it.
    const ignore = () => {};
    process.on('SIGINT', ignore);
    const child = spawn(name, programArguments, { stdio: 'inherit', env: environment });
    const done = () => process.off('SIGINT', ignore);
    child.once('error', (error: NodeJS.ErrnoException) => {
      done();
      if (error.code === 'ENOENT') resolve(undefined);
      else reject(error);
    });
    child.once('exit', (code) => {
      done();
      resolve(code ?? 1);
    });
  });
}
