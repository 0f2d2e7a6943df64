package main

import "testing"

func TestIsTimeUp(t *testing.T) {
	for said, want := range map[string]bool{
		"fuzz: elapsed: 3s\n--- FAIL: FuzzOneLine (3.45s)\n    context deadline exceeded\nFAIL\nexit status 1\n":                                                                                   true,
		"--- FAIL: FuzzOneLine (0.02s)\n    --- FAIL: FuzzOneLine (0.00s)\n        x_test.go:3: context deadline exceeded\n    \n    Failing input written to testdata/fuzz/FuzzOneLine/1\nFAIL\n": false,
		"--- FAIL: FuzzOneLine (3.45s)\n    fuzzing process hung or terminated unexpectedly: exit status 2\nFAIL\n":                                                                                false,
		"PASS\n": false,
	} {
		if isTimeUp(said) != want {
			t.Errorf("%q: want %v", said, want)
		}
	}
}
