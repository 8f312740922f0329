package payments

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"wharf/commands"
	"wharf/domain"
	"wharf/domain/payments"
)

// Provider is the payment provider.
type Provider interface {
	// Ask asks for the intent of the order's payment and returns the provider's final word. An error is no word: it
	// may have done the deed or not, and is asked again under the same key.
	Ask(ctx context.Context, order string, intent payments.Intent) (payments.Answer, error)
}

const (
	askAtOnce   = 16 // requests under way per partition: one slow payment does not hold up others
	firstDelay  = 100 * time.Millisecond
	longestWait = 30 * time.Second
)

// Intents asks the provider for every open intent of one partition's payments and records its answers, until ctx
// ends. An intent is tried for ever, with growing pauses. The owner of the partition runs it, after its policies have
// caught up; should two run at once, the intent's key makes the provider do the deed once, and the stream takes one
// answer.
func (s Service) Intents(ctx context.Context, partition int32) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, askAtOnce)
	var mu sync.Mutex
	working := map[string]map[payments.Intent]context.CancelFunc{} // by order
	s.Journal.Watch(ctx, partition, func(order string, p payments.Payment, at domain.Position) {
		mu.Lock()
		defer mu.Unlock()
		for i, cancel := range working[order] {
			if !slices.Contains(p.Intents, i) {
				cancel() // a void made the authorisation moot, or somebody else recorded the answer
			}
		}
		for _, i := range p.Intents {
			if working[order][i] != nil {
				continue
			}
			if working[order] == nil {
				working[order] = map[payments.Intent]context.CancelFunc{}
			}
			try, cancel := context.WithCancel(ctx)
			working[order][i] = cancel
			wg.Go(func() {
				s.pursue(try, order, i, at, slots)
				mu.Lock()
				defer mu.Unlock()
				cancel()
				if delete(working[order], i); len(working[order]) == 0 {
					delete(working, order)
				}
			})
		}
	})
}

// pursue asks until there is an answer and the answer is recorded, as caused by the event that the payment stood at
// when the intent was found open.
func (s Service) pursue(ctx context.Context, order string, i payments.Intent, at domain.Position, slots chan struct{}) {
	delay := firstDelay
	for {
		answer, err := s.ask(ctx, order, i, slots)
		if err == nil {
			_, err = s.Journal.Handle(ctx, commands.Command{Stream: order, IfMatch: commands.AnyVersion, Cause: at},
				func(p payments.Payment) ([]domain.Event, error) { return p.DecideSettle(i, answer) })
		}
		if err == nil || ctx.Err() != nil || errors.Is(err, commands.ErrQuarantined) {
			return
		}
		slog.Warn("a payment intent stays open, trying again", "order", order, "intent", i.Kind, "err", err)
		select {
		case <-time.After(delay/2 + rand.N(delay)):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, longestWait)
	}
}

func (s Service) ask(ctx context.Context, order string, i payments.Intent, slots chan struct{}) (payments.Answer, error) {
	select {
	case slots <- struct{}{}:
		defer func() { <-slots }()
		return s.Provider.Ask(ctx, order, i)
	case <-ctx.Done():
		return payments.Answer{}, ctx.Err()
	}
}
