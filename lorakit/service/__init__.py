from lorakit.extras import require

require("sqlalchemy")  # every part of the service comes to the database: one message for all
