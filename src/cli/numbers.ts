/** Numbers in options, as commander wants them parsed: what is wrong with one is told in one way. */
import { InvalidArgumentError } from 'commander';

/** Digits only: no 1e3, no 0x10, nothing empty. */
export function wholeNumber(minimum: number, maximum = Number.MAX_SAFE_INTEGER): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (/^-?\d+$/.test(text) && value >= minimum && value <= maximum) return value;
    const range = maximum === Number.MAX_SAFE_INTEGER ? `${minimum} or above` : `from ${minimum} to ${maximum}`;
    throw new InvalidArgumentError(`It must be a whole number, ${range}.`);
  };
}
