package journal_test

import (
	"testing"

	"go.uber.org/goleak"

	"wharf/commands"
	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

var _ commands.Journal[journaltest.Counter] = (*journal.Journal[journaltest.Counter])(nil)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestOnMemory(t *testing.T) {
	journaltest.Run(t, func(_ testing.TB, partitions int) (journal.Log, journal.PublicLog) {
		return journal.NewMemory(partitions), journal.NewMemory(partitions)
	})
}
