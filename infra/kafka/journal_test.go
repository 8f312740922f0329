package kafka

import (
	"testing"

	"wharf/infra/journal"
	"wharf/infra/journal/journaltest"
)

func TestJournalOnKafka(t *testing.T) {
	c := connect(t, brokers(t))
	journaltest.Run(t, func(t testing.TB, partitions int) (journal.Log, journal.PublicLog) {
		return c.Log(topic(t, c, int32(partitions))), c.PublicLog(topic(t, c, int32(partitions)))
	})
}
