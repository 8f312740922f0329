// Package domaintest answers the question "how do tests of an aggregate read?": given events, when a decision is
// made, then events. It is used by the tests of the packages beside it.
package domaintest

import (
	"errors"
	"reflect"

	"wharf/domain"
)

// TB is what of a *testing.T or a *rapid.T is needed.
type TB interface {
	Helper()
	Fatal(...any)
	Fatalf(string, ...any)
}

// State is an aggregate's state.
type State[S any] interface{ Evolve(domain.Event) S }

// Scenario is a stream's history so far, and what came of the last decision.
type Scenario[S State[S]] struct {
	t      TB
	State  S
	events []domain.Event
	err    error
}

// Given starts a scenario in which the events have happened.
func Given[S State[S]](t TB, events ...domain.Event) *Scenario[S] {
	t.Helper()
	s := &Scenario[S]{t: t}
	s.evolve(events)
	return s
}

// evolve goes through the stored form of each event, as the journal does.
func (s *Scenario[S]) evolve(events []domain.Event) {
	s.t.Helper()
	for _, e := range events {
		data, err := domain.Encode(e)
		if err != nil {
			s.t.Fatal(err)
		}
		stored, err := domain.EventsOf(e).Decode(e.EventName(), data)
		if err != nil {
			s.t.Fatal(err)
		}
		s.State = s.State.Evolve(stored)
	}
}

// When makes a decision. Whatever it yields has happened before the next one.
func (s *Scenario[S]) When(decide func(S) ([]domain.Event, error)) *Scenario[S] {
	s.t.Helper()
	s.events, s.err = decide(s.State)
	s.evolve(s.events)
	return s
}

// Then expects exactly these events, and no refusal.
func (s *Scenario[S]) Then(want ...domain.Event) *Scenario[S] {
	s.t.Helper()
	if s.err != nil {
		s.t.Fatalf("refused: %v", s.err)
	}
	if len(s.events) != len(want) || len(want) > 0 && !reflect.DeepEqual(s.events, want) {
		s.t.Fatalf("events\n  %+v\nwant\n  %+v", s.events, want)
	}
	return s
}

// ThenNothing expects that what was asked for is so already.
func (s *Scenario[S]) ThenNothing() *Scenario[S] {
	s.t.Helper()
	return s.Then()
}

// ThenRefused expects a refusal with the code, and no events.
func (s *Scenario[S]) ThenRefused(code string) *Scenario[S] {
	s.t.Helper()
	var r *domain.Refusal
	if !errors.As(s.err, &r) || r.Code != code || len(s.events) > 0 {
		s.t.Fatalf("events %+v, error %v, want the refusal %q", s.events, s.err, code)
	}
	return s
}
