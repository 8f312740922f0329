package payments_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"wharf/commands"
	paymentsapi "wharf/commands/payments"
	"wharf/domain"
	"wharf/domain/payments"
	"wharf/infra/journal"
)

// scripted is a provider that does what the test says, and counts what it was asked.
type scripted struct {
	mu    sync.Mutex
	asked map[string]int // by key
	ask   func(ctx context.Context, try int, key string) (payments.Answer, error)
}

func (s *scripted) Ask(ctx context.Context, order string, i payments.Intent) (payments.Answer, error) {
	s.mu.Lock()
	s.asked[i.Key(order)]++
	try := s.asked[i.Key(order)]
	s.mu.Unlock()
	return s.ask(ctx, try, i.Key(order))
}

var approved = payments.Answer{Approved: true, Reference: "ref"}

// inTime runs the test with the driver on a journal in memory, in a bubble whose clock jumps ahead when everybody waits.
func inTime(t *testing.T, p *scripted, test func(t *testing.T, s paymentsapi.Service)) {
	synctest.Test(t, func(t *testing.T) {
		p.asked = map[string]int{}
		j := journal.New[payments.Payment](journal.Config{Service: "payments", Topic: "payments.events", Partitions: 1,
			Events: payments.Events, Log: journal.NewMemory(1), Public: journal.NewMemory(1)})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		s := paymentsapi.Service{Journal: j, Provider: p}
		wg.Go(func() { _ = j.Run(ctx) })
		wg.Go(func() { s.Intents(ctx, 0) })
		test(t, s)
		cancel()
		wg.Wait()
	})
}

func do(t *testing.T, s paymentsapi.Service, order string, decide commands.Decision[payments.Payment]) payments.Payment {
	t.Helper()
	var seen payments.Payment
	_, err := s.Journal.Handle(t.Context(), commands.Command{Stream: order, IfMatch: commands.AnyVersion},
		func(p payments.Payment) ([]domain.Event, error) {
			seen = p
			return decide(p)
		})
	if err != nil {
		t.Fatal(err)
	}
	return seen
}

func authorize(p payments.Payment) ([]domain.Event, error) {
	return p.DecideAuthorize(domain.Money{Amount: 100, Currency: "GBP"})
}

func wantStatus(t *testing.T, s paymentsapi.Service, order string, want payments.Status) {
	t.Helper()
	got := do(t, s, order, func(payments.Payment) ([]domain.Event, error) { return nil, nil })
	if got.Status != want {
		t.Fatalf("payment %s is %s, want %s", order, got.Status, want)
	}
}

func TestAnIntentIsTriedUntilThereIsAnAnswer(t *testing.T) {
	p := &scripted{ask: func(_ context.Context, try int, _ string) (payments.Answer, error) {
		if try < 40 {
			return payments.Answer{}, errors.New("500")
		}
		return approved, nil
	}}
	inTime(t, p, func(t *testing.T, s paymentsapi.Service) {
		do(t, s, "a", authorize)
		time.Sleep(10 * time.Second)
		wantStatus(t, s, "a", payments.StatusAuthorizing)
		time.Sleep(time.Hour)
		wantStatus(t, s, "a", payments.StatusAuthorized)
		if p.asked["a:authorize"] != 40 {
			t.Errorf("the provider was asked %d times", p.asked["a:authorize"])
		}
	})
}

func TestASlowPaymentHoldsUpNoOther(t *testing.T) {
	p := &scripted{ask: func(ctx context.Context, _ int, key string) (payments.Answer, error) {
		if key == "slow:authorize" {
			<-ctx.Done()
			return payments.Answer{}, ctx.Err()
		}
		return approved, nil
	}}
	inTime(t, p, func(t *testing.T, s paymentsapi.Service) {
		do(t, s, "slow", authorize)
		for _, order := range []string{"a", "b", "c"} {
			do(t, s, order, authorize)
		}
		synctest.Wait()
		wantStatus(t, s, "slow", payments.StatusAuthorizing)
		for _, order := range []string{"a", "b", "c"} {
			wantStatus(t, s, order, payments.StatusAuthorized)
		}
	})
}

// The order ends while the authorisation hangs: it is void, and what the provider says of it later counts no more.
func TestAVoidOvertakesAnAuthorization(t *testing.T) {
	p := &scripted{ask: func(ctx context.Context, _ int, key string) (payments.Answer, error) {
		if key == "a:authorize" {
			<-ctx.Done() // nobody waits for it any more
		}
		return approved, nil
	}}
	inTime(t, p, func(t *testing.T, s paymentsapi.Service) {
		do(t, s, "a", authorize)
		synctest.Wait()
		do(t, s, "a", func(p payments.Payment) ([]domain.Event, error) { return p.DecideEnd([16]byte{1}) })
		synctest.Wait()
		wantStatus(t, s, "a", payments.StatusVoided)
		time.Sleep(time.Hour)
		if p.asked["a:authorize"] != 1 || p.asked["a:void"] != 1 {
			t.Errorf("the provider was asked %v", p.asked)
		}
	})
}

func TestOpenIntentsAreTakenUpByTheNextOwner(t *testing.T) {
	p := &scripted{ask: func(context.Context, int, string) (payments.Answer, error) { return approved, nil }}
	p.asked = map[string]int{}
	synctest.Test(t, func(t *testing.T) {
		j := journal.New[payments.Payment](journal.Config{Service: "payments", Topic: "payments.events", Partitions: 1,
			Events: payments.Events, Log: journal.NewMemory(1), Public: journal.NewMemory(1)})
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = j.Run(ctx) })
		s := paymentsapi.Service{Journal: j, Provider: p}
		do(t, s, "a", authorize)
		wg.Go(func() { s.Intents(ctx, 0) })
		synctest.Wait()
		wantStatus(t, s, "a", payments.StatusAuthorized)
		cancel()
		wg.Wait()
	})
}
