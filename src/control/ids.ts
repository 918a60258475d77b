/**
 * Ids in Neon's forms, which its clients look at: `adj-noun-12345678` (project), `br-adj-noun-12345678` (branch; the command line takes only
 * this shape for a branch id, everything else for a name), `ep-adj-noun-12345678` (endpoint); operations have UUIDs. Timelines and tenants,
 * which users do not see, have 32 hex digits.
 *
 * Eight digits and two words give 6 × 10^11 ids; the state's primary keys refuse the repetition that chance might still bring.
 */
import { randomBytes, randomInt, randomUUID } from 'node:crypto';

const ADJECTIVES = (
  'aged ancient autumn billowing bitter black blue bold broad broken calm clear cold cool crimson curly damp dark dawn delicate divine dry ' +
  'empty falling fancy flat floral fragrant frosty gentle green hidden holy icy jolly late lingering little lively long lucky misty morning ' +
  'muddy mute nameless noisy odd old orange patient plain polished proud purple quiet rapid raspy red restless rough round royal shiny shrill ' +
  'shy silent small snowy soft solitary spring square steep still summer sweet tight tiny twilight wandering weathered white wild winter wispy'
).split(' ');

const NOUNS = (
  'art band bar base bird block boat bonus bread breeze brook bush butterfly cake cell cherry cloud credit darkness dawn dew disk dream dust ' +
  'feather field fire firefly flower fog forest frog frost glade glitter grass hall hat haze heart hill king lab lake leaf limit math meadow ' +
  'mode moon morning mountain mouse mud night paper pine poetry pond queen rain recipe resonance rice river salad scene sea shadow shape ' +
  'silence sky smoke snow snowflake sound star sun sunset surf term thunder tooth tree truth union unit violet voice water wave wildflower wind'
).split(' ');

export function newProjectId(): string {
  const digits = randomInt(10_000_000, 100_000_000);
  return `${pick(ADJECTIVES)}-${pick(NOUNS)}-${digits}`;
}

export function newBranchId(): string {
  return `br-${newProjectId()}`;
}

export function newEndpointId(): string {
  return `ep-${newProjectId()}`;
}

export function newOperationId(): string {
  return randomUUID();
}

export function newImportId(): string {
  return randomUUID();
}

export function newTenantId(): string {
  return randomBytes(16).toString('hex');
}

export function newTimelineId(): string {
  return randomBytes(16).toString('hex');
}

function pick(words: readonly string[]): string {
  return words[randomInt(words.length)]!;
}
