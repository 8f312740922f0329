// Package payments answers the question "what can happen to an order's payment?". Read this file first. What an
// outside provider must do is recorded as an intent before it is asked; Intents lists those that are still open, and
// Settle records the provider's answer to one.
package payments

import (
	"slices"

	"github.com/google/uuid"

	"wharf/domain"
)

// Status is where a payment stands. Its values are what the HTTP API shows.
type Status string

// The life of a payment.
const (
	StatusAuthorizing     Status = "authorizing"
	StatusAuthorized      Status = "authorized"
	StatusDeclined        Status = "declined"
	StatusCapturing       Status = "capturing"
	StatusCaptured        Status = "captured"
	StatusCaptureDeclined Status = "capture_declined"
	StatusVoiding         Status = "voiding"
	StatusVoided          Status = "voided"
	StatusRefunded        Status = "refunded" // wholly
)

// Kind is what the provider is asked to do.
type Kind string

// The kinds of intents.
const (
	Authorize Kind = "authorize"
	Capture   Kind = "capture"
	Void      Kind = "void"
	Refund    Kind = "refund"
)

// Intent is something that the provider must be asked to do, again and again until it answers.
type Intent struct {
	Kind   Kind
	Refund uuid.UUID // of a refund
	Amount domain.Money
}

// Key is the provider's idempotency key for the intent of the order's payment: the same for every try, and never
// used for anything else.
func (i Intent) Key(order string) string {
	if i.Kind == Refund {
		return order + ":refund:" + i.Refund.String()
	}
	return order + ":" + string(i.Kind)
}

// Answer is the provider's final word on an intent.
type Answer struct {
	Approved  bool
	Reference string // the provider's name for the deed
	Reason    string // of a decline
}

// Payment is the state that decisions need. The zero value was never asked for. Amounts are minor units of Currency.
type Payment struct {
	Status     Status
	Currency   string
	Amount     int64 // asked for
	Authorized int64
	Captured   int64
	Refunded   int64
	Pending    int64    // refunds asked for and not answered
	Intents    []Intent // open, oldest first
}

// Evolve is the payment after one more fact. It never refuses one, and the receiver stays as it was.
func (p Payment) Evolve(event domain.Event) Payment {
	switch e := event.(type) {
	case AuthorizationRequested:
		p = Payment{Status: StatusAuthorizing, Currency: e.Amount.Currency, Amount: e.Amount.Amount}
		return p.open(Intent{Kind: Authorize, Amount: e.Amount})
	case Authorized:
		p.Status, p.Authorized = StatusAuthorized, e.Amount.Amount
		return p.settled(Authorize, uuid.Nil)
	case Declined:
		p.Status = StatusDeclined
		return p.settled(Authorize, uuid.Nil)
	case CaptureRequested:
		p.Status = StatusCapturing
		return p.open(Intent{Kind: Capture, Amount: e.Amount})
	case Captured:
		p.Status, p.Captured = StatusCaptured, p.Captured+e.Amount.Amount
		return p.settled(Capture, uuid.Nil)
	case CaptureDeclined:
		p.Status = StatusCaptureDeclined
		return p.settled(Capture, uuid.Nil)
	case VoidRequested:
		// The void names the authorisation by its key and bars it for ever, so nobody need ask for that any more.
		p.Status = StatusVoiding
		return p.settled(Authorize, uuid.Nil).open(Intent{Kind: Void, Amount: p.money(p.Amount)})
	case Voided:
		p.Status = StatusVoided
		return p.settled(Void, uuid.Nil)
	case RefundRequested:
		p.Pending += e.Amount.Amount
		return p.open(Intent{Refund, e.Refund, e.Amount})
	case Refunded:
		p.Pending -= e.Amount.Amount
		p.Refunded += e.Amount.Amount
		if p.Refunded == p.Captured {
			p.Status = StatusRefunded
		}
		return p.settled(Refund, e.Refund)
	case RefundDeclined:
		p.Pending -= e.Amount.Amount
		return p.settled(Refund, e.Refund)
	}
	return p
}

// Closed says that nothing can happen to the payment any more.
func (p Payment) Closed() bool {
	return len(p.Intents) == 0 && (p.Status == StatusDeclined || p.Status == StatusVoided || p.Status == StatusRefunded)
}

func (p Payment) money(amount int64) domain.Money {
	return domain.Money{Amount: amount, Currency: p.Currency}
}

func (p Payment) open(i Intent) Payment {
	p.Intents = append(slices.Clip(p.Intents), i)
	return p
}

func (p Payment) find(kind Kind, refund uuid.UUID) int {
	return slices.IndexFunc(p.Intents, func(i Intent) bool { return i.Kind == kind && i.Refund == refund })
}

func (p Payment) settled(kind Kind, refund uuid.UUID) Payment {
	if i := p.find(kind, refund); i >= 0 {
		p.Intents = slices.Delete(slices.Clone(p.Intents), i, i+1)
	}
	return p
}

// DecideAuthorize asks the provider to set the amount aside.
func (p Payment) DecideAuthorize(amount domain.Money) ([]domain.Event, error) {
	if p.Status != "" {
		return nil, nil
	}
	return []domain.Event{AuthorizationRequested{amount}}, nil
}

// DecideCapture asks for the authorised money, once.
func (p Payment) DecideCapture() ([]domain.Event, error) {
	if p.Status != StatusAuthorized {
		return nil, nil
	}
	return []domain.Event{CaptureRequested{p.money(p.Authorized)}}, nil
}

// DecideEnd undoes what was done for an order that ended without delivery; refund is the id of the refund, if it takes
// one. A capture under way is left alone. (Capture comes with dispatch, and an order ends so only if its shipment did not leave: so in truth there
// is never anything to pay back, but money is not the place to rely on others.)
func (p Payment) DecideEnd(refund uuid.UUID) ([]domain.Event, error) {
	switch p.Status {
	case StatusAuthorizing, StatusAuthorized:
		return []domain.Event{VoidRequested{}}, nil
	case StatusCaptured:
		if left := p.Captured - p.Refunded - p.Pending; left > 0 && p.find(Refund, refund) < 0 {
			return []domain.Event{RefundRequested{refund, p.money(left)}}, nil
		}
	}
	return nil, nil
}

// DecideRefund pays back part or all of what was captured. Refunds under way count as paid.
func (p Payment) DecideRefund(refund uuid.UUID, amount domain.Money) ([]domain.Event, error) {
	switch {
	case p.Status == "":
		return nil, domain.ErrUnknown
	case p.find(Refund, refund) >= 0:
		return nil, nil
	case p.Captured == 0:
		return nil, domain.Refuse("payment-not-captured", "nothing was captured that could be refunded")
	case amount.Currency != p.Currency:
		return nil, domain.Refuse("refund-currency", "a refund must be in the currency of the payment")
	case amount.Amount > p.Captured-p.Refunded-p.Pending:
		return nil, domain.Refuse("refund-too-large", "refunds would exceed what was captured")
	}
	return []domain.Event{RefundRequested{refund, amount}}, nil
}

// DecideSettle records the provider's answer to an intent. An intent that is no longer open, because it was answered
// or overtaken by a void, yields nothing.
func (p Payment) DecideSettle(i Intent, a Answer) ([]domain.Event, error) {
	if p.find(i.Kind, i.Refund) < 0 {
		return nil, nil
	}
	switch i.Kind {
	case Authorize:
		if !a.Approved {
			return []domain.Event{Declined{a.Reason}}, nil
		}
		return []domain.Event{Authorized{i.Amount, a.Reference, transfer(AccountAuthorizedFor, AccountAuthorized, i.Amount)}}, nil
	case Capture:
		if !a.Approved {
			return []domain.Event{CaptureDeclined{a.Reason}}, nil
		}
		return []domain.Event{Captured{i.Amount, append(transfer(AccountAuthorized, AccountAuthorizedFor, i.Amount),
			transfer(AccountRevenue, AccountReceivable, i.Amount)...)}}, nil
	case Void:
		held := p.money(p.Authorized)
		return []domain.Event{Voided{held, transfer(AccountAuthorized, AccountAuthorizedFor, held)}}, nil
	case Refund:
		if !a.Approved {
			return []domain.Event{RefundDeclined{i.Refund, i.Amount, a.Reason}}, nil
		}
		return []domain.Event{Refunded{i.Refund, i.Amount, transfer(AccountReceivable, AccountRevenue, i.Amount)}}, nil
	}
	return nil, nil
}
