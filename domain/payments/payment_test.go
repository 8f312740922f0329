package payments_test

import (
	"testing"

	"github.com/google/uuid"
	"pgregory.net/rapid"

	"wharf/domain"
	"wharf/domain/domaintest"
	"wharf/domain/payments"
)

var (
	total   = gbp(3428)
	r1, r2  = uuid.New(), uuid.New()
	yes, no = payments.Answer{Approved: true, Reference: "ref"}, payments.Answer{Reason: "no funds"}
)

func gbp(n int64) domain.Money { return domain.Money{Amount: n, Currency: "GBP"} }

type decision = func(payments.Payment) ([]domain.Event, error)

func authorize(p payments.Payment) ([]domain.Event, error) { return p.DecideAuthorize(total) }
func end(p payments.Payment) ([]domain.Event, error)       { return p.DecideEnd(r2) }
func refund(id uuid.UUID, n int64) decision {
	return func(p payments.Payment) ([]domain.Event, error) { return p.DecideRefund(id, gbp(n)) }
}

// settle answers the first open intent of the kind.
func settle(kind payments.Kind, a payments.Answer) decision {
	return func(p payments.Payment) ([]domain.Event, error) {
		for _, i := range p.Intents {
			if i.Kind == kind {
				return p.DecideSettle(i, a)
			}
		}
		return p.DecideSettle(payments.Intent{Kind: kind, Amount: total}, a)
	}
}

func given(t *testing.T, events ...domain.Event) *domaintest.Scenario[payments.Payment] {
	t.Helper()
	return domaintest.Given[payments.Payment](t, events...)
}

func captured(t *testing.T) *domaintest.Scenario[payments.Payment] {
	t.Helper()
	return given(t).When(authorize).When(settle(payments.Authorize, yes)).
		When(payments.Payment.DecideCapture).When(settle(payments.Capture, yes))
}

func post(to, from string, n int64) []payments.Posting {
	return []payments.Posting{{Account: to, Amount: gbp(n)}, {Account: from, Amount: gbp(-n)}}
}

func TestTheWayOfAPayment(t *testing.T) {
	given(t).
		When(authorize).Then(payments.AuthorizationRequested{Amount: total}).
		When(authorize).ThenNothing().
		When(settle(payments.Authorize, yes)).Then(payments.Authorized{Amount: total, Reference: "ref",
		Postings: post("authorized", "authorized_for", 3428)}).
		When(settle(payments.Authorize, yes)).ThenNothing().
		When(payments.Payment.DecideCapture).Then(payments.CaptureRequested{Amount: total}).
		When(payments.Payment.DecideCapture).ThenNothing().
		When(settle(payments.Capture, yes)).Then(payments.Captured{Amount: total,
		Postings: append(post("authorized_for", "authorized", 3428), post("receivable", "revenue", 3428)...)}).
		When(settle(payments.Capture, yes)).ThenNothing()
}

func TestADeclinedAuthorizationEndsIt(t *testing.T) {
	given(t).When(authorize).When(settle(payments.Authorize, no)).Then(payments.Declined{Reason: "no funds"}).
		When(end).ThenNothing().
		When(payments.Payment.DecideCapture).ThenNothing()
}

func TestAnEndedOrderOwesNothing(t *testing.T) {
	given(t).When(end).ThenNothing()
	given(t).When(authorize).When(settle(payments.Authorize, yes)).
		When(end).Then(payments.VoidRequested{}).
		When(end).ThenNothing().
		When(settle(payments.Void, yes)).Then(payments.Voided{Amount: total, Postings: post("authorized_for", "authorized", 3428)})
	captured(t).When(end).Then(payments.RefundRequested{Refund: r2, Amount: total}).When(end).ThenNothing()
}

// Authorised after the order ended: the void has barred it, and the late answer changes nothing.
func TestALateAuthorization(t *testing.T) {
	given(t).When(authorize).When(end).Then(payments.VoidRequested{}).
		When(settle(payments.Authorize, yes)).ThenNothing().
		When(settle(payments.Void, yes)).Then(payments.Voided{Amount: gbp(0), Postings: post("authorized_for", "authorized", 0)})
}

func TestRefunds(t *testing.T) {
	given(t).When(refund(r1, 1)).ThenRefused("unknown")
	given(t).When(authorize).When(refund(r1, 1)).ThenRefused("payment-not-captured")
	captured(t).
		When(refund(r1, 3000)).Then(payments.RefundRequested{Refund: r1, Amount: gbp(3000)}).
		When(refund(r1, 3000)).ThenNothing().
		When(refund(r2, 429)).ThenRefused("refund-too-large").
		When(settle(payments.Refund, no)).Then(payments.RefundDeclined{Refund: r1, Amount: gbp(3000), Reason: "no funds"}).
		When(refund(r2, 3428)).Then(payments.RefundRequested{Refund: r2, Amount: total}).
		When(settle(payments.Refund, yes)).Then(payments.Refunded{Refund: r2, Amount: total, Postings: post("revenue", "receivable", 3428)}).
		When(refund(r1, 1)).ThenRefused("refund-too-large")
	captured(t).When(func(p payments.Payment) ([]domain.Event, error) {
		return p.DecideRefund(r1, domain.Money{Amount: 1, Currency: "EUR"})
	}).ThenRefused("refund-currency")
}

// After any commands and answers: the ledger sums to zero, and authorised >= captured >= refunded + pending.
func TestTheLedgerBalances(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := domaintest.Given[payments.Payment](t).When(authorize)
		ledger, captures := map[string]int64{}, 0
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			answer := rapid.SampledFrom([]payments.Answer{yes, no}).Draw(t, "answer")
			decide := rapid.SampledFrom([]decision{
				settle(payments.Authorize, answer), settle(payments.Capture, answer), settle(payments.Void, yes),
				settle(payments.Refund, answer), payments.Payment.DecideCapture, end,
				refund(uuid.New(), rapid.Int64Range(1, 4000).Draw(t, "refund")),
			}).Draw(t, "command")
			events, _ := decide(s.State)
			for _, e := range events {
				s.State = s.State.Evolve(e)
				var postings []payments.Posting
				switch e := e.(type) {
				case payments.Authorized:
					postings = e.Postings
				case payments.Captured:
					postings = e.Postings
					captures++
				case payments.Voided:
					postings = e.Postings
				case payments.Refunded:
					postings = e.Postings
				}
				for _, p := range postings {
					ledger[p.Account] += p.Amount.Amount
				}
			}
			sum := int64(0)
			for _, balance := range ledger {
				sum += balance
			}
			p := s.State
			if sum != 0 || captures > 1 || p.Authorized < p.Captured || p.Captured < p.Refunded+p.Pending || p.Pending < 0 {
				t.Fatalf("ledger %v, %d captures, payment %+v", ledger, captures, p)
			}
		}
	})
}
