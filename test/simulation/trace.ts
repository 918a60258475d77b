/** What happened in a run, as lines that a person reads: time, who, what. */
import type { TermHistory } from '../../src/consensus/messages.ts';
import type { FromAcceptor, ToAcceptor } from './simulated-acceptor.ts';

/** Called with a function, so that a run that nobody follows makes no text. */
export type Trace = (who: string, what: () => string) => void;

export const NO_TRACE: Trace = () => {};

export function describe(message: ToAcceptor | FromAcceptor): string {
  switch (message.kind) {
    case 'greeting':
      return 'greeting';
    case 'greeting-reply':
      return `greeting-reply: term ${message.term}, generation ${message.generation}, configuration ${message.configuration.version}${message.isBlank ? ', blank' : ''}`;
    case 'absent':
      return `there is no log here, incarnation ${message.incarnation}`;
    case 'create':
      return `make the log, incarnation ${message.incarnation}: ${JSON.stringify(message.state)}`;
    case 'renew':
      return `renew: term ${message.term}, generation ${message.generation}, configuration ${message.configuration.version}`;
    case 'read':
      return `read from ${message.fromLsn}, term ${message.term}`;
    case 'read-reply':
      return `read-reply ${range(message.lsn, message.bytes)}`;
    case 'resume':
      return 'where may a log begin?';
    case 'resume-reply':
      return `a log may begin at ${message.lsn}`;
    case 'read-refusal':
      return 'there is no log here to read';
    case 'vote':
      return `vote for term ${message.term}, generation ${message.generation}, configuration ${message.configuration.version}?`;
    case 'vote-reply': {
      const { granted, isVoter, term, generation, configuration, flushLsn, commitLsn, history } = message;
      const log = `log to ${flushLsn}, committed ${commitLsn}, history ${describeHistory(history)}`;
      return `vote-reply: ${granted ? 'granted' : isVoter ? 'not granted' : 'no voter yet'}, term ${term}, generation ${generation}, configuration ${configuration.version}, ${log}`;
    }
    case 'elected':
      return `elected: term ${message.term}, go on from ${message.startLsn}, history ${describeHistory(message.history)}`;
    case 'append':
      return `append ${range(message.beginLsn, message.bytes)}, term ${message.term}, committed ${message.commitLsn}`;
    case 'append-reply': {
      const { term, flushLsn, writeLsn, commitLsn, configurationVersion } = message;
      return `append-reply: term ${term}, configuration ${configurationVersion}, flushed ${flushLsn}, written ${writeLsn}, committed ${commitLsn}`;
    }
    case 'refusal':
      return `refusal: term ${message.term}, ${message.message}`;
    case 'term-notice':
      return `term-notice: term ${message.term}`;
  }
}

export function describeHistory(history: TermHistory): string {
  return `[${history.map(({ term, startLsn }) => `${term}@${startLsn}`).join(' ')}]`;
}

function range(lsn: number, bytes: Buffer): string {
  return `[${lsn}, ${lsn + bytes.length})`;
}
