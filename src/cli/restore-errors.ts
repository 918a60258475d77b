/**
 * What pg_restore complains of, entry by entry, as it writes it to standard error with --verbose:
 *
 *   pg_restore: from TOC entry 3457; 0 16385 TABLE items owner               which entry the next errors are about: kind, name, owner
 *   pg_restore: error: could not execute query: ERROR:  …                    DETAIL and the like follow, each on its line
 *   Command was: …                                                           over several lines, up to the next line of pg_restore
 *
 * Not all can be restored by an owner who is no superuser: that is listed. What means that data is lost, or that a rule about data does not hold, is
 * fatal: the import cannot count as one.
 */

export interface RestoreError {
  /** As pg_restore names it: EXTENSION, ACL, TABLE DATA, …; empty when it is about no entry. */
  readonly kind: string;
  readonly name: string;
  readonly message: string;
  readonly isFatal: boolean;
}

const DATA_KINDS = new Set(['TABLE DATA', 'BLOBS', 'BLOB', 'BLOB METADATA', 'LARGE OBJECT', 'SEQUENCE SET']);
const BROKEN_RULE = /could not create unique index|violates (?:\w+[ -])*constraint|duplicate key value/;
/** pg_restore sets what its own version has. */
const NEWER_SETTING = /unrecognized configuration parameter/;
const LOST_CONNECTION =
  /server closed the connection|no connection to the server|terminating connection|could not connect|connection to server .* failed|SSL connection has been closed/;
const ENTRY = /^pg_restore: from TOC entry \d+; \d+ \d+ (.*)$/;
/** Longer ones first. Which words belong to the kind cannot be seen otherwise. */
const KINDS = [
  'ACCESS METHOD|ACL LANGUAGE|ACL|AGGREGATE|ATTRIBUTE|BLOB COMMENTS|BLOB METADATA|BLOBS|BLOB|CAST|CHECK CONSTRAINT|COLLATION|COMMENT',
  'CONSTRAINT|CONVERSION|DATABASE PROPERTIES|DATABASE|DEFAULT ACL|DEFAULT|DOMAIN|EVENT TRIGGER|EXTENSION|FK CONSTRAINT|FOREIGN DATA WRAPPER',
  'FOREIGN SERVER|FOREIGN TABLE|FUNCTION|INDEX ATTACH|INDEX|LARGE OBJECT|MATERIALIZED VIEW DATA|MATERIALIZED VIEW|OPERATOR CLASS',
  'OPERATOR FAMILY|OPERATOR|POLICY|PROCEDURAL LANGUAGE|PROCEDURE|PUBLICATION TABLES IN SCHEMA|PUBLICATION TABLE|PUBLICATION|ROW SECURITY',
  'RULE|SCHEMA|SECURITY LABEL|SEQUENCE OWNED BY|SEQUENCE SET|SEQUENCE|SERVER|SHELL TYPE|STATISTICS DATA|STATISTICS|SUBSCRIPTION TABLE',
  'SUBSCRIPTION|TABLE ATTACH|TABLE DATA|TABLE|TEXT SEARCH CONFIGURATION|TEXT SEARCH DICTIONARY|TEXT SEARCH PARSER|TEXT SEARCH TEMPLATE',
  'TRANSFORM|TRIGGER|TYPE|USER MAPPING|VIEW',
];
const KIND = new RegExp(`^(${KINDS.join('|')}) (.*)$`);
const ERROR = /^pg_restore: error: (.*)$/;
const DATA_OF = /^pg_restore: processing data for table "(.*)"$/;

export class RestoreErrors {
  readonly #errors: RestoreError[] = [];
  #kind = '';
  #name = '';
  #rest = '';
  /** Tables whose data was begun. */
  tableCount = 0;
  currentTable = '';

  /** Takes a piece of standard error. Gives the first fatal error, when there is one by now. */
  push(text: string): RestoreError | undefined {
    const lines = (this.#rest + text).split('\n');
    this.#rest = lines.pop() ?? '';
    for (const line of lines) this.#line(line);
    return this.fatal;
  }

  get all(): readonly RestoreError[] {
    return this.#errors;
  }

  get fatal(): RestoreError | undefined {
    return this.#errors.find((error) => error.isFatal);
  }

  #line(line: string): void {
    const table = DATA_OF.exec(line);
    if (table !== null) {
      this.tableCount++;
      this.currentTable = table[1]!;
      return;
    }
    const entry = ENTRY.exec(line);
    if (entry !== null) {
      const [, kind = 'entry', rest = entry[1]!] = KIND.exec(entry[1]!) ?? [];
      this.#kind = kind;
      // The owner stands last.
      this.#name = rest.replace(/ (?:\(no owner\)|\S*)$/, '');
      return;
    }
    const error = ERROR.exec(line);
    if (error === null) return;
    const message = error[1]!.replace(/^could not execute query: /, '').replace(/^ERROR: {2}/, '');
    const isData = DATA_KINDS.has(this.#kind) || message.startsWith('COPY failed');
    const isUnknown = this.#kind === '' && !NEWER_SETTING.test(message);
    const isFatal = isData || isUnknown || BROKEN_RULE.test(message) || LOST_CONNECTION.test(message);
    this.#errors.push({ kind: this.#kind, name: this.#name, message, isFatal });
  }
}
