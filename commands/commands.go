// Package commands answers the question "what can be asked of the shop, and who reacts to what?".
//
// This file is the seam between a service and its journal; choreography.go is the table of all policies. Each service
// has a package of its own below this one with its HTTP commands and its policies: start with commands/orders.
package commands

import (
	"context"
	"errors"

	"wharf/domain"
)

// State is an aggregate's state: a value that the journal folds events into and decisions are made on.
type State[S any] interface {
	// Evolve is the state after one more event. It accepts every event ever recorded and leaves the receiver alone.
	Evolve(domain.Event) S
	// Closed says that the stream has ended, so that the journal may forget what only open streams need.
	Closed() bool
}

// Decision turns the current state into events. It must be pure: the journal calls it again after a lost race, and
// may call it on a state that never comes to be. No events and no error means that what was asked for is so already;
// a *domain.Refusal means no.
type Decision[S any] func(S) ([]domain.Event, error)

// Command is what the journal needs to know of a command beside its decision.
type Command struct {
	Stream  string // the entity's id
	Key     string // Idempotency-Key, or empty
	Request string // all that was asked, in one canonical form: what a key stands for
	IfMatch int64  // the version that the stream must have (0: it must not exist), AnyVersion or Existing
	Trace   string // W3C traceparent, or empty
	Note    *int   // where the decision leaves a word for the answer; it is in the Receipt, of retries too

	// Cause is the event that the command is made for, zero for a request from outside. With a Group, the stream
	// remembers the highest Cause.Seq per group and partition, and a command at or below it is a repetition.
	Cause domain.Position
	Group string
}

// AnyVersion is the Command.IfMatch that matches every stream, Existing the one that matches every stream that exists.
const (
	AnyVersion = -1
	Existing   = -2
)

// Receipt is the answer to an accepted command.
type Receipt struct {
	Stream   string
	Version  int64           // of the stream after the command
	Position domain.Position // at which everything the command did, or found done, is public
	Note     int             // what the decision left at Command.Note
}

// Journal is the write side of one service: it appends what decisions yield, atomically and in order, or finds out
// that there was nothing to append.
type Journal[S any] interface {
	// Handle decides the command on the stream's current state and returns once the outcome is certain. It returns
	// the decision's own error (on a state that was current after the call began), or one of the errors below.
	Handle(context.Context, Command, Decision[S]) (Receipt, error)

	// HandleInOrder handles commands to one stream, caused by events of one source partition, as Handle does one
	// after the other, though perhaps in one commit. It returns how many have been handled, a refusal being an answer
	// like any other, and why the next one has not: what comes after that has not been appended either.
	HandleInOrder(context.Context, []Command, []Decision[S]) (int, error)

	// Watch calls f with every open stream of the partition, and then with each stream that changes (several
	// changes may come as one), until ctx ends. f runs in the caller's goroutine, and gets the state that is current
	// and the position of the stream's last event.
	Watch(ctx context.Context, partition int32, f func(stream string, state S, at domain.Position))
}

// The errors of Handle, beside those of the decision.
var (
	// ErrKeyReused: the Idempotency-Key was used for another request on this stream.
	ErrKeyReused = errors.New("the Idempotency-Key was used for another request")
	// ErrPrecondition: the stream is not at the version that If-Match asks for.
	ErrPrecondition = errors.New("the entity is not at the version that If-Match asks for")
	// ErrConflict: other writers won too many times in a row. Nothing was appended for this command.
	ErrConflict = errors.New("too many other changes at the same time")
	// ErrUnknownOutcome: the caller's time ran out after the commit was sent. It may still be accepted; only a
	// retry with the same Idempotency-Key tells.
	ErrUnknownOutcome = errors.New("outcome unknown, retry with the same Idempotency-Key")
	// ErrNotReady: the journal cannot answer now (still reading, log out of reach, queue full, time ran out before
	// anything was sent). Nothing was appended for this command.
	ErrNotReady = errors.New("not ready")
	// ErrQuarantined: the stream holds a commit that this program cannot read.
	ErrQuarantined = errors.New("the stream is quarantined: it holds a commit that cannot be read")
	// ErrTooLarge: the log refuses a record with the command's events for good. Nothing was appended.
	ErrTooLarge = errors.New("the command's events are too large for the log")
)
