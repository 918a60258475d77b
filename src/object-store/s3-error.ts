/**
 * What an S3 server or the way to it said, as our kinds of errors.
 * Codes: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
 */
import { S3ServiceException } from '@aws-sdk/client-s3';
import { ObjectStoreError } from './object-store.ts';
import type { ObjectErrorKind } from './object-store.ts';

/** Codes whose status alone would mislead. */
const KIND_OF_CODE: Readonly<Record<string, ObjectErrorKind>> = {
  NoSuchKey: 'not-found',
  NotFound: 'not-found', // HEAD has no body to say more
  NoSuchBucket: 'rejected',
  NoSuchUpload: 'rejected',
  PreconditionFailed: 'exists',
  ConditionalRequestConflict: 'transient',
  OperationAborted: 'transient',
  InvalidRange: 'damaged',
  // The bytes changed on the way there; ours are still whole.
  BadDigest: 'transient',
  XAmzContentChecksumMismatch: 'transient',
  XAmzContentSHA256Mismatch: 'transient',
  IncompleteBody: 'transient',
  RequestTimeout: 'transient',
  // The client has learnt the server's clock from this answer.
  RequestTimeTooSkewed: 'transient',
  SlowDown: 'transient',
  InternalError: 'transient',
  ServiceUnavailable: 'transient',
  NotImplemented: 'unsupported',
  InvalidAccessKeyId: 'denied',
  SignatureDoesNotMatch: 'denied',
  AccessDenied: 'denied',
  ExpiredToken: 'denied',
  InvalidToken: 'denied',
  AccountProblem: 'denied',
};

/** The kind that belongs to an error code of S3 and its HTTP status (0: none known). */
export function kindOfS3Error(code: string, httpStatus: number): ObjectErrorKind {
  const known = KIND_OF_CODE[code];
  if (known !== undefined) return known;
  if (httpStatus === 401 || httpStatus === 403) return 'denied';
  if (httpStatus === 412) return 'exists';
  if (httpStatus === 408 || httpStatus === 429 || httpStatus === 503) return 'transient';
  if (httpStatus === 501) return 'unsupported';
  if (httpStatus >= 400 && httpStatus < 500) return 'rejected';
  return 'transient';
}

/** Any error of the S3 client as ours. What is not from the server is the network's (also an answer that broke off), or the credentials'. */
export function toObjectError(error: unknown, what: string): unknown {
  if (error instanceof ObjectStoreError) return error;
  if (!(error instanceof Error)) return error;
  const cause = { cause: error };
  if (error instanceof S3ServiceException) {
    const status = error.$metadata.httpStatusCode ?? 0;
    const message = `${what}: ${error.name} (HTTP ${status}): ${error.message}`;
    return new ObjectStoreError(kindOfS3Error(error.name, status), message, cause);
  }
  // No credentials anywhere, or a profile that is not there: waiting does not help.
  if (error.name === 'CredentialsProviderError')
    return new ObjectStoreError('denied', `${what}: ${error.message}`, cause);
  const code = (error as NodeJS.ErrnoException).code;
  // The local file's errors, in getToFile and putFile.
  if (code !== undefined && FILE_ERRORS.has(code)) {
    return new ObjectStoreError('rejected', `${what}: ${error.message}`, cause);
  }
  // A bug of ours is no weather.
  if (code === undefined && (error instanceof TypeError || error instanceof RangeError)) return error;
  return new ObjectStoreError('transient', `${what}: ${code ?? error.name}: ${error.message}`, cause);
}

const FILE_ERRORS: ReadonlySet<string> = new Set(['ENOENT', 'EACCES', 'EISDIR', 'ENOTDIR', 'EPERM', 'EROFS']);
