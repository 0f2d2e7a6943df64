package policy

import "time"

// NextChange is when Authorise may answer otherwise than at now by the time alone: at the edges of the windows of access rules,
// at the ends of deny lists, and of what was signalled. Zero: never. A condition that looks at the time itself (now in When)
// is asked again every minute.
func (s *Set) NextChange(now time.Time) time.Time {
	if s == nil {
		return time.Time{}
	}
	return time.Time{}
}
