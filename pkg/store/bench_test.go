package store

import "testing"

// One durable entry: what a grant waits for.
func BenchmarkAppend(b *testing.B) {
	s, err := Open(b.TempDir() + "/node.db")
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	data := make([]byte, 1000)
	for b.Loop() {
		if _, err := s.Append(b.Context(), data); err != nil {
			b.Fatal(err)
		}
	}
}
